"""The numbers of a suite: what results.json, results.csv, the report and the terminal's table show.

Every number is a mean over the seeds that finished, with their sample standard deviation as `spread` (null for one
seed). Those that a verdict rests on have the bounds `low` and `high` of a bootstrap interval, `over` seeds where
there are several, else over documents, or over the evaluation sequences where the documents are not known. Routing
metrics come in the forms `top_1` and `top_k`, both before dropping, and `top_k_kept`, after dropping, where anything
was dropped; each per MoE layer and averaged over layers. A run that is not causal also has `moe_layers`, the names of
its layers, and under `stacks` the same of the layers of each stack alone. What a run did not record is null. A run that
failed, was cut off or was never started stays in the results with its reason. The same folder gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_testbed.launcher.report.numbers import causal, gap, routing
from moe_testbed.launcher.report.numbers.kept import routing_kept
from moe_testbed.launcher.report.numbers.probing import probing
from moe_testbed.launcher.report.numbers.spikes import loss_spikes
from moe_testbed.launcher.report.numbers.stages import stages
from moe_testbed.launcher.report.numbers.training import over_training
from moe_testbed.launcher.report.numbers.values import Results, part_of, rounded, stat
from moe_testbed.launcher.report.read.records import Suite, Training, read_suite
from moe_testbed.launcher.report.two_processes import in_two
from moe_testbed.launcher.run.records import ONE_STACK

FORMAT = 2
SUMMARY = ("parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_second", "peak_memory_bytes")


def summarise(suite: Suite) -> Results:
    """All numbers of a suite, runs in the suite's order; see the module's docstring."""
    evaluated = [evaluation for label in suite.descriptions for evaluation in suite.evaluations(label).values()]
    domains = evaluated[0].domains if evaluated else ()
    reference = gap.reference(suite)
    notes = list(suite.notes)
    measured = in_two(measure, [(_finished(suite, label), domains) for label in suite.descriptions])
    runs = []
    for label, (parts, left_out) in zip(suite.descriptions, measured, strict=True):
        runs.append({**_run(suite, label, reference["best"], domains), **parts})
        notes += left_out
    staged = stages(suite)
    if staged is not None and len(set(staged["tasks"].values())) > 1:
        notes.append("the runs have different tasks, and losses of different tasks do not compare: see the stages")
    if len(domains) == 1:
        notes.append(f"{domains[0]} is the only domain: specialization by domain has no meaning here")
    probed, left_out = probing(suite)
    notes += left_out
    results: Results = rounded(
        {
            "format": FORMAT,
            "suite": suite.name,
            "seeds": list(suite.seeds),
            "split": _split(suite),
            "domains": list(domains),
            "control": suite.control,
            "reference": reference,
            "notes": notes,
            "runs": runs,
            **({} if staged is None else {"stages": staged}),
            **({"probing": probed} if probed else {}),
        }
    )
    return results


def ranked(results: Results) -> list[Results]:
    """The runs as a table lists them: the best reference, the others by rising loss, those without a loss last; where
    runs have different tasks, those of one task together."""
    best = results["reference"]["best"]
    tasks = results.get("stages", {}).get("tasks", {})
    order = list(dict.fromkeys(tasks.values()))

    def place(run: Results) -> tuple[bool, int, float]:
        task = order.index(tasks[run["label"]]) if tasks else 0
        return run["label"] != best, task, math.inf if run["loss"]["mean"] is None else run["loss"]["mean"]

    return sorted(results["runs"], key=place)


def read_results(suite_dir: Path) -> Results:
    """The results of a suite's folder as it is now. Raises ValueError if it is no suite's folder."""
    return summarise(read_suite(suite_dir))


def measure(runs: Sequence[tuple[Sequence[Training], Sequence[str]]]) -> list[tuple[Results, list[str]]]:
    """What each run's finished trainings say by themselves, without the other runs; and what of it was left out."""
    return [_measure(trainings, domains) for trainings, domains in runs]


def _measure(trainings: Sequence[Training], domains: Sequence[str]) -> tuple[Results, list[str]]:
    found, notes = _of_layers(trainings, domains)
    found |= {name: stat([_figure(getattr(training.summary, name)) for training in trainings]) for name in SUMMARY}
    notes += _empty_layers(trainings)
    layers = trainings[0].layers if trainings else ONE_STACK
    if layers.stacks:
        found["moe_layers"] = layers.names
        found["stacks"] = {
            stack: _of_layers([training.of_layers(numbers) for training in trainings], domains)[0]
            for stack, numbers in layers.by_stack.items()
        }
    kept = routing_kept(trainings, domains)
    return found if kept is None else {**found, "routing_kept": kept}, notes


def _of_layers(trainings: Sequence[Training], domains: Sequence[str]) -> tuple[Results, list[str]]:
    """All that is said of layers and averaged over them."""
    evaluations = [training.evaluation for training in trainings if training.evaluation is not None]
    analyses = [training.ablation for training in trainings if training.ablation is not None]
    course, notes = over_training(trainings)

    def lenient(part: str, numbers: Callable[[], Results | None]) -> Results | None:
        """Arrays that fit can still make no sense: that costs the part, not the report."""
        try:
            return numbers()
        except (ValueError, IndexError) as error:
            notes.append(f"{trainings[0].label}: no numbers of {part}: {' '.join(str(error).split())}")
            return None

    return {
        "routing": routing.routing(evaluations),
        **routing.usage(evaluations, domains),
        "agreement": lenient("agreement", lambda: routing.agreement(evaluations)),
        "router_measures": lenient("the router", lambda: part_of("router_measures", evaluations)),
        "coactivation": lenient("co-activation", lambda: part_of("coactivation", evaluations)),
        "vocabulary": lenient("the vocabulary", lambda: routing.vocabulary(evaluations)),
        "redundancy": lenient(
            "redundancy",
            lambda: causal.redundancy(
                analyses, [t.setting("model", "hidden_size") for t in trainings if t.ablation is not None]
            ),
        ),
        "causes": lenient("causes", lambda: causal.causes(analyses, domains)),
        "over_training": course,
    }, notes


def _run(suite: Suite, label: str, best: str | None, domains: Sequence[str]) -> Results:
    """What a run is, its losses, and the gap."""
    losses = {seed: evaluation.loss for seed, evaluation in suite.evaluations(label).items()}
    return {
        "label": label,
        "description": suite.descriptions[label],
        "role": gap.role(suite, label),
        "router": gap.router(suite, label),
        "causal": gap.causal(suite, label),
        "trainings": [
            {
                "seed": training.seed,
                "state": training.state,
                "reason": training.reason,
                "step": training.step,
                "steps": training.steps,
                "loss": losses.get(training.seed),
                "loss_spikes": loss_spikes(training.curve("train", "cross_entropy")),
                "skipped_steps": training.skipped_steps,
            }
            for training in suite.of(label)
        ],
        **gap.losses(suite, label, domains),
        **gap.recovered(suite, label, best, domains),
    }


def _finished(suite: Suite, label: str) -> list[Training]:
    return [training for training in suite.of(label) if training.evaluation is not None]


def _split(suite: Suite) -> str:
    """The split that was evaluated."""
    splits = {training.split for training in suite.trainings if training.evaluation is not None}
    return " or ".join(sorted(splits)) or "validation"


def _figure(value: object) -> float:
    """A summary's number, nan for anything else."""
    return float(value) if isinstance(value, int | float) else math.nan


def _empty_layers(trainings: Sequence[Training]) -> list[str]:
    notes = []
    for training in trainings:
        counts_YDE = () if training.evaluation is None else training.evaluation.counts_top_k_YDE
        names = training.layers.names or [str(y) for y in range(len(counts_YDE))]
        empty = [name for name, counts_DE in zip(names, counts_YDE, strict=True) if not counts_DE.any()]
        if empty:
            layers = f"layer{'s' if len(empty) > 1 else ''} {', '.join(empty)}"
            said = f"no assignments in MoE {layers}, left out of the means over layers"
            notes.append(f"{training.label}, seed {training.seed}: {said}")
    return notes
