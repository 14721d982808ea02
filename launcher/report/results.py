"""The numbers of a suite: what results.json, results.csv, the report and the terminal's table show.

Every number is a mean over the seeds that finished, with their sample standard deviation as `spread` (null for one
seed). Those that a verdict rests on have the bounds `low` and `high` of a 95 % bootstrap interval, `over` seeds where
there are several, else over documents, or over the evaluation sequences where the documents are not known. Routing
metrics come in the forms `top_1` and `top_k`, both before dropping, and `top_k_kept`, after dropping, where anything
was dropped; each per MoE layer and averaged over layers. What a run did not record is null. A run that failed, was cut
off or was never started stays in the results with its reason. The same folder gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_testbed.launcher.files import write_atomically
from moe_testbed.launcher.report import numbers_causal, numbers_gap, numbers_routing
from moe_testbed.launcher.report.arrays import Evaluation
from moe_testbed.launcher.report.numbers import Results, rounded, stat
from moe_testbed.launcher.report.numbers_training import over_training
from moe_testbed.launcher.report.records import Suite, read_suite
from moe_testbed.launcher.report.results_csv import csv_text

FORMAT = 2
SUMMARY = ("parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_second", "peak_memory_bytes")


def summarise(suite: Suite) -> Results:
    """All numbers of a suite, runs in the suite's order; see the module's docstring."""
    evaluated = [evaluation for label in suite.descriptions for evaluation in suite.evaluations(label).values()]
    domains = evaluated[0].domains if evaluated else ()
    reference = numbers_gap.reference(suite)
    notes = list(suite.notes)
    runs = [_run(suite, label, reference["best"], domains, notes) for label in suite.descriptions]
    if len(domains) == 1:
        notes.append(f"{domains[0]} is the only domain: specialization by domain has no meaning here")
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
        }
    )
    return results


def ranked(results: Results) -> list[Results]:
    """The runs as a table lists them: the best reference, the others by rising loss, those without a loss last."""
    best = results["reference"]["best"]
    return sorted(
        results["runs"],
        key=lambda run: (run["label"] != best, math.inf if run["loss"]["mean"] is None else run["loss"]["mean"]),
    )


def write_results(results: Results, suite_dir: Path) -> tuple[Path, Path]:
    """Write results.json and results.csv into the suite's folder; returns their paths."""
    json_path, csv_path = suite_dir / "results.json", suite_dir / "results.csv"
    write_atomically(json_path, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(csv_path, csv_text(results))
    return json_path, csv_path


def read_results(suite_dir: Path) -> Results:
    """The results of a suite's folder as it is now. Raises ValueError if it is no suite's folder."""
    return summarise(read_suite(suite_dir))


def _run(suite: Suite, label: str, best: str | None, domains: Sequence[str], notes: list[str]) -> Results:
    by_seed = suite.evaluations(label)
    evaluations = list(by_seed.values())
    finished = [training for training in suite.of(label) if training.seed in by_seed]
    analyses = [training.analysis for training in finished if training.analysis is not None]
    training_curves, left_out = over_training(finished)
    notes += left_out
    notes += _empty_layers(label, by_seed)

    def lenient(part: str, numbers: Callable[[], Results | None]) -> Results | None:
        """Files whose arrays fit can still make no sense: that costs the part, not the report."""
        try:
            return numbers()
        except ValueError as error:
            notes.append(f"{label}: no numbers of {part}: {' '.join(str(error).split())}")
            return None

    return {
        "label": label,
        "description": suite.descriptions[label],
        "role": numbers_gap.role(suite, label),
        "router": numbers_gap.router(suite, label),
        "causal": numbers_gap.causal(suite, label),
        "trainings": [
            {
                "seed": training.seed,
                "state": training.state,
                "reason": training.reason,
                "step": training.step,
                "steps": training.steps,
                "loss": by_seed[training.seed].loss if training.seed in by_seed else None,
            }
            for training in suite.of(label)
        ],
        **numbers_gap.losses(suite, label, domains),
        **numbers_gap.recovered(suite, label, best, domains),
        "routing": numbers_routing.routing(evaluations),
        **numbers_routing.usage(evaluations, domains),
        "agreement": lenient("agreement", lambda: numbers_routing.agreement(evaluations)),
        "router_measures": lenient("the router", lambda: numbers_routing.router(evaluations)),
        "coactivation": lenient("co-activation", lambda: numbers_routing.coactivation(evaluations)),
        "vocabulary": lenient("the vocabulary", lambda: numbers_routing.vocabulary(evaluations)),
        "redundancy": lenient("redundancy", lambda: numbers_causal.redundancy(analyses)),
        "causes": lenient("causes", lambda: numbers_causal.causes(analyses, domains)),
        "over_training": training_curves,
        **{name: stat([float(t.summary.get(name, math.nan)) for t in finished]) for name in SUMMARY},
    }


def _split(suite: Suite) -> str:
    """The split that was evaluated."""
    splits = {training.split for training in suite.trainings if training.evaluation is not None}
    return " or ".join(sorted(splits)) or "validation"


def _empty_layers(label: str, by_seed: dict[int, Evaluation]) -> list[str]:
    notes = []
    for seed, evaluation in by_seed.items():
        empty = [str(y) for y, counts_DE in enumerate(evaluation.counts_top_k_YDE) if not counts_DE.any()]
        if empty:
            layers = f"layer{'s' if len(empty) > 1 else ''} {', '.join(empty)}"
            notes.append(f"{label}, seed {seed}: no assignments in MoE {layers}, left out of the means over layers")
    return notes
