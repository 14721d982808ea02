"""Tables of trainings in stages: the ledger, what is saved at equal loss, and losses by the kind of target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.tables.extra_tables import ExtraTable
from moe_testbed.launcher.report.tables.table import Cell, stat_cell
from moe_testbed.launcher.report.words import NOTHING, number, percent

Results = dict[str, Any]
_TERA = 1e12


def stage_tables(results: Results) -> Iterator[ExtraTable]:
    """The tables that have rows; none in a suite without stages."""
    staged = results.get("stages")
    if staged is None:
        return
    labels = [run["label"] for run in ranked(results)]
    losses = {run["label"]: run["loss"] for run in results["runs"]}
    yield from _ledger(staged, labels, losses)
    yield from _savings(staged)
    yield from _kinds(staged, labels)


def _ledger(staged: Results, labels: list[str], losses: dict[str, Results]) -> Iterator[ExtraTable]:
    rows: list[tuple[Cell, ...]] = []
    for label in labels:
        ledger = staged["ledger"][label]
        if ledger is None:
            continue
        own, inherited = ledger["flops"]["mean"], _inherited(ledger, "flops")
        units = _inherited(ledger, "layer_units")
        by_part = ", ".join(f"{part} {number(of['mean'] / _TERA, 2)}" for part, of in ledger["flops_by_part"].items())
        rows.append(
            (
                Cell(label),
                Cell(staged["tasks"][label]),
                stat_cell(losses[label], 3),
                Cell(number(own / _TERA, 2), by_part, own),
                _known(inherited, _TERA, 2),
                _known(None if inherited is None else own + inherited, _TERA, 2),
                _known(None if units is None else ledger["layer_units"]["mean"] + units, 1, 0),
            )
        )
    if rows:
        yield ExtraTable(
            "stages",
            "Ledger",
            "FLOPs in units of 10^12, mean over seeds; inherited are those of the runs that a run starts from, not "
            "known where that is an export that does not tell.",
            ("Run", "Task", "Loss", "Own FLOPs", "Inherited", "Together", "Layer units together"),
            rows,
        )


def _inherited(ledger: Results, currency: str) -> float | None:
    found = ledger[f"inherited_{currency}"]
    return None if found is None else float(found["mean"])


def _known(value: float | None, unit: float, digits: int) -> Cell:
    return Cell("not known") if value is None else Cell(number(value / unit, digits), value=value)


def _savings(staged: Results) -> Iterator[ExtraTable]:
    rows: list[tuple[Cell, ...]] = []
    for found in staged["saved"]:
        named = {"flops": "FLOPs", "layer_units": "layer units"}[found["currency"]]
        rows.append(
            (
                Cell(f"{found['encoder']}, then {found['recipe']}"),
                Cell(f"{found['scratch']} ({found['tables']} tables)"),
                Cell(named),
                _share(found["ends"]),
                _share(found["mid_run"]),
            )
        )
    if rows:
        yield ExtraTable(
            "stages",
            "Saved at equal loss",
            "What both models cost less than two trainings from scratch, (S - S2) / (E + S), with S2 the cost at which "
            "the second stage comes to the final loss from scratch with the same embedding tables: between trainings "
            "of several lengths, each with a schedule of its own, and within the longest one, whose learning rate is "
            "still high at that point. Mean over the seeds that came so far, with Student's interval at 95 %. Negative "
            "is a loss. “At least”: already the cheapest point was below that loss.",
            ("Second stage", "From scratch", "In", "Between lengths", "Within the longest"),
            rows,
        )


def _share(found: Results) -> Cell:
    if not found["of"]:
        return Cell(NOTHING)
    if not found["reached"]:
        return Cell("not reached", f"0 of {found['of']} seeds")
    words = "at least " if found["at_least"] else ""
    bounds = "" if found["low"] is None else f"[{number(100 * found['low'], 0)}, {number(100 * found['high'], 0)}], "
    return Cell(f"{words}{percent(found['mean'])}", f"{bounds}{found['reached']} of {found['of']} seeds", found["mean"])


def _kinds(staged: Results, labels: list[str]) -> Iterator[ExtraTable]:
    names = list(dict.fromkeys(kind for kinds in staged["kinds"].values() for kind in kinds))
    if not names:
        return
    rows: list[tuple[Cell, ...]] = []
    for label in labels:
        kinds = staged["kinds"].get(label)
        if kinds is None:
            continue
        cells = [stat_cell(kinds[kind]["loss"], 3) if kind in kinds else Cell(NOTHING) for kind in names]
        steps = (staged["copying_step"].get(label) or {"steps": []})["steps"]
        emerges = ", ".join("never" if step is None else number(step, 0) for step in steps) or NOTHING
        rows.append((Cell(label), *cells, Cell(emerges)))
    yield ExtraTable(
        "stages",
        "Losses by the kind of target",
        "Nats per token, mean over seeds. Copied tokens are in the text that the encoder reads, those of a gap are "
        "not. Copying emerges at the first evaluated step with less than one nat at copied tokens, a number for each "
        "seed.",
        ("Run", *(name.replace("_", " ") for name in names), "Copying emerges at step"),
        rows,
    )
