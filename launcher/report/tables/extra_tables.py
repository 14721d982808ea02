"""Tables beside the result table, one for each question that not every run can answer: runs without it are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.numbers.spikes import DEVIATIONS, WINDOW
from moe_testbed.launcher.report.tables.table import Cell, stat_cell
from moe_testbed.launcher.report.words import NOTHING, interval, number
from moe_testbed.launcher.run.files import value_at
from moe_testbed.routing.metrics import REPORTED, Metric

Results = dict[str, Any]


@dataclass(frozen=True)
class ExtraTable:
    """A table of runs for one section of the page; the first cell of a row is the run's label."""

    section: str
    title: str
    caption: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


def extra_tables(results: Results) -> list[ExtraTable]:
    """The tables that have rows, runs in the order of the result table."""
    runs = ranked(results)
    return [table for build in _TABLES for table in build(runs)]


def _table(runs: Sequence[Results], part: str, section: str, title: str, caption: str) -> Iterator[ExtraTable]:
    """A table of one part of the runs; metrics that no run has are left out."""
    having = [run for run in runs if run.get(part) is not None]
    measures = [metric for metric in REPORTED if metric.part == part]
    shown = [m for m in measures if any(_mean(run[part].get(m.name)) is not None for run in having)]
    if not shown:
        return
    rows = [(Cell(run["label"]), *(_cell(run[part].get(m.name), m) for m in shown)) for run in having]
    columns = tuple(metric.column_title for metric in shown)
    yield ExtraTable(section, title, caption, ("Run", *columns), rows)
    of_stacks = [
        (Cell(run["label"]), Cell(stack), *(_cell(of_stack[part].get(m.name), m) for m in shown))
        for run in having
        for stack, of_stack in _stacks(run)
        if of_stack.get(part) is not None
    ]
    if of_stacks:
        yield ExtraTable(section, f"{title}, by stack", _BY_STACK, ("Run", "Stack", *columns), of_stacks)


_BY_STACK = "Mean over the layers of each stack, of the runs that have more than one."


def _stacks(run: Results) -> list[tuple[str, Results]]:
    """The stacks of a run that has more than one, and what is said of each."""
    stacks = list(run.get("stacks", {}).items())
    return stacks if len(stacks) > 1 else []


def _mean(stat: Results | None) -> float | None:
    return None if stat is None else stat["mean"]


def _cell(stat: Results | None, metric: Metric) -> Cell:
    """The mean; beside it the interval, or else the spread."""
    if stat is None or stat["mean"] is None:
        return Cell(NOTHING)
    cell = stat_cell(stat, metric.digits, metric.in_percent)
    if stat.get("low") is None:
        return cell
    return replace(cell, note=interval(stat, 100 if metric.in_percent else 1, metric.digits))


def _training(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    having = [run for run in runs if run["over_training"] is not None and run["over_training"]["settled_step"]]
    steps = {}
    for run in having:
        layers = run["over_training"]["settled_step"]["layers"]
        names = run.get("moe_layers", ())
        if len(names) != len(layers):
            names = [f"MoE layer {layer}" for layer in range(len(layers))]
        steps[run["label"]] = {name: _step(layer["mean"]) for name, layer in zip(names, layers, strict=True)}
    columns = list(dict.fromkeys(name for of_run in steps.values() for name in of_run))
    if not columns:
        return
    rows = [(Cell(label), *(of_run.get(name, Cell(NOTHING)) for name in columns)) for label, of_run in steps.items()]
    yield ExtraTable(
        "training",
        "When each layer settles",
        "The first step from which on nine tenths of the probe's choices are those of the end, mean over the seeds; "
        "“not before the end” where a seed has no such step before its last one.",
        ("Run", *columns),
        rows,
    )


def _spikes(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    having = [run for run in runs if any(t["loss_spikes"] or t["skipped_steps"] for t in run["trainings"])]
    if having:
        yield ExtraTable(
            "curves",
            "Loss spikes and skipped steps",
            f"A loss spike is a training loss that lies above the median of the {WINDOW} steps before it by more than "
            f"{DEVIATIONS:g} of their standard deviations (1.4826 times their median absolute deviation); neighbouring "
            "steps are one spike. A step is skipped where its gradient is not finite, as often as "
            "training.max_skipped_steps allows.",
            ("Run", "Spikes", "Skipped steps", "Where"),
            [
                (
                    Cell(run["label"]),
                    _count(sum(len(t["loss_spikes"]) for t in run["trainings"])),
                    _count(sum(t["skipped_steps"] for t in run["trainings"])),
                    Cell("; ".join(map(_where, (t for t in run["trainings"] if t["loss_spikes"])))),
                )
                for run in having
            ],
        )


def _count(count: int) -> Cell:
    return Cell(number(count, 0), value=count)


def _where(training: Results) -> str:
    """The first steps of one seed at which its loss has spiked."""
    steps = [f"{step:,}" for step in training["loss_spikes"][:5]]
    more = " and others" if len(training["loss_spikes"]) > len(steps) else ""
    return f"seed {training['seed']} at step {', '.join(steps)}{more}"


def _step(step: float | None) -> Cell:
    return Cell("not before the end") if step is None else Cell(number(step, 0), value=step)


def _by_stack(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    """The columns of the result table that are means over layers."""
    shown = [metric for metric in REPORTED if metric.column is not None and metric.of]
    rows = [
        (Cell(run["label"]), Cell(stack), *(_cell(value_at(of_stack, *m.path), m) for m in shown))
        for run in runs
        for stack, of_stack in _stacks(run)
    ]
    if rows:
        columns = ("Run", "Stack", *(metric.column_title for metric in shown))
        yield ExtraTable("layers", "Use and specialization by stack", f"Top-k choices. {_BY_STACK}", columns, rows)


def _kept(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    """What remains of the encoder's routing, and of that of each domain."""
    yield from _table(
        runs,
        "routing_kept",
        "stages",
        "What remains of the encoder's routing",
        "Of runs that start from an encoder with experts: shares of the decisions (probe token, layer of the encoder) "
        "at the end that are those of before the first step, beside what they would be by chance at the same loads.",
    )
    having = [run for run in runs if run.get("routing_kept") is not None]
    domains = list(dict.fromkeys(d for run in having for d in run["routing_kept"]["first_choice_kept_by_domain"]))
    by_domain = [metric for metric in REPORTED if metric.part == "routing_kept"]
    rows = [
        (
            Cell(run["label"]),
            Cell(metric.title),
            *(_cell(run["routing_kept"][f"{metric.name}_by_domain"].get(domain), metric) for domain in domains),
        )
        for run in having
        for metric in by_domain
    ]
    if rows:
        yield ExtraTable(
            "stages",
            "What remains of the encoder's routing, by domain",
            "The same of the probe tokens of each domain. Chance is that within the domain: a router that sends each "
            "domain to its own experts keeps as much even if it forgets the tokens.",
            ("Run", "Share", *domains),
            rows,
        )


def _agreement(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    return _table(
        runs,
        "agreement",
        "agreement",
        "Experts matched to domains",
        "Each expert is given to one domain, every domain getting its even number of experts, so that as much as "
        "possible of the routing stays within its own domain's experts.",
    )


def _router(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    yield from _table(
        runs,
        "router_measures",
        "router",
        "Scores and vectors",
        "Entropies in nats. Routers without scores, or without a vector for each expert, have no such numbers.",
    )


def _causal(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    having = [run for run in runs if run["causes"] is not None]
    sizes = sorted({run["causes"]["sequences"] for run in having})
    barred = sorted({run["causes"]["experts"] for run in having} - {0})
    sample = f"Sample: {' or '.join(f'{size:,}' for size in sizes)} evaluation sequences"
    sample += f", {' or '.join(f'{count:,}' for count in barred)} experts barred one by one. " if barred else ". "
    yield from _table(
        runs,
        "causes",
        "causal",
        "What happens without an expert, and with others' experts",
        f"{sample}Changes of loss in nats per token. The bounds are bootstrap intervals at nominally 95 %, over "
        "seeds, where few make them little more than a range, or else over the sample's sequences. Routers without "
        "scores (hash, random) have no second choice: what they may not use falls away. Those that read the label are "
        "told another one; the control ignores it.",
    )


def _redundancy(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    yield from _table(
        runs,
        "redundancy",
        "redundancy",
        "Outputs and weights",
        "All experts on the same tokens; means over the pairs of each layer.",
    )
    yield from _table(
        runs,
        "coactivation",
        "redundancy",
        "Co-activation",
        "How much of an expert's tokens its most frequent partner shares, and how much a partner does on average.",
    )


def _vocabulary(runs: Sequence[Results]) -> Iterator[ExtraTable]:
    yield from _table(
        runs,
        "vocabulary",
        "vocabulary",
        "How much the token alone decides",
        "First choices by token id, over the ids seen at least 10 times in the evaluation set, the most frequent 2,048 "
        "at most.",
    )


_TABLES: tuple[Callable[[Sequence[Results]], Iterator[ExtraTable]], ...] = (
    _spikes,
    _kept,
    _training,
    _by_stack,
    _agreement,
    _router,
    _causal,
    _redundancy,
    _vocabulary,
)
