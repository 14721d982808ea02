"""The numbers of a suite: what results.json, results.csv, the report and the terminal's table show.

Every number is a mean over the seeds that finished, with their sample standard deviation as `spread` (null for one
seed). Routing metrics come in the forms `top_1` and `top_k`, both before dropping, and `top_k_kept`, after dropping,
where anything was dropped; each per MoE layer and averaged over layers. A run that failed, was cut off or was never
started stays in the results with its reason. The same folder gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.files import write_atomically
from moe_testbed.launcher.report.records import Evaluation, Suite, read_suite
from moe_testbed.routing import gap, metrics

Results = dict[str, Any]
"""The content of results.json."""

FORMAT = 1
SIGNIFICANT_DIGITS = 9
METRICS: dict[str, Callable[[NDArray[np.int64]], float]] = {
    "domain_information": metrics.domain_information,
    "nmi_geometric": metrics.nmi_geometric,
    "purity": metrics.purity,
    "matched_purity": metrics.matched_purity,
    "effective_experts": metrics.effective_experts,
    "normalised_effective_experts": metrics.normalised_effective_experts,
    "inverse_simpson": metrics.inverse_simpson,
    "dead_experts": metrics.dead_experts,
    "coefficient_of_variation": metrics.coefficient_of_variation,
    "max_violation": metrics.max_violation,
    "gini": metrics.gini,
}


def summarise(suite: Suite) -> Results:
    """All numbers of a suite, runs in the suite's order; see the module's docstring."""
    best = _lowest(suite, [label for label in suite.reference if label in suite.descriptions])
    evaluated = [evaluation for label in suite.descriptions for evaluation in suite.evaluations(label).values()]
    domains = evaluated[0].domains if evaluated else ()
    others = [
        label for label in suite.descriptions if _role(suite, label) in ("learned", "fixed") and _causal(suite, label)
    ]
    learned = [label for label in others if _role(suite, label) == "learned"]
    results = {
        "format": FORMAT,
        "suite": suite.name,
        "seeds": list(suite.seeds),
        "domains": list(domains),
        "control": suite.control,
        "reference": {
            "labels": list(suite.reference),
            "best": best,
            "lead_over_control": _lead(suite, suite.control, best),
            "lead_over_best_other": _lead(suite, _lowest(suite, others), best),
            "lead_over_best_learned": _lead(suite, _lowest(suite, learned), best),
        },
        "runs": [_run(suite, label, best, domains) for label in suite.descriptions],
    }
    rounded: Results = _rounded(results)
    return rounded


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
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("run", "role", "router", "quantity", "form", "moe_layer", "domain", "mean", "spread", "seeds"))
    writer.writerows(row for run in results["runs"] for row in _csv_rows(run))
    write_atomically(csv_path, text.getvalue())
    return json_path, csv_path


def read_results(suite_dir: Path) -> Results:
    """The results of a suite's folder as it is now. Raises ValueError if it is no suite's folder."""
    return summarise(read_suite(suite_dir))


def _run(suite: Suite, label: str, best: str | None, domains: Sequence[str]) -> Results:
    by_seed = suite.evaluations(label)
    evaluations = list(by_seed.values())
    summaries = [training.summary for training in suite.of(label) if training.seed in by_seed]
    losses = [evaluation.loss for evaluation in evaluations]
    return {
        "label": label,
        "description": suite.descriptions[label],
        "role": _role(suite, label),
        "router": _router(suite, label),
        "causal": _causal(suite, label),
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
        "loss": _stat(losses),
        "perplexity": _stat([math.exp(loss) if loss < 700 else math.inf for loss in losses]),
        "loss_by_domain": {
            domain: _stat([float(evaluation.loss_D[d]) for evaluation in evaluations])
            for d, domain in enumerate(domains)
        },
        **_recovered(suite, label, best, domains),
        "routing": _routing(evaluations),
        "experts_per_token": _layered(evaluations, _experts_per_token),
        "drop_rate": _layered(evaluations, _drop_rates),
        "drop_rate_by_domain": {
            domain: _layered(evaluations, partial(_drop_rates, domain=d)) for d, domain in enumerate(domains)
        },
        **{name: _stat([float(summary.get(name, math.nan)) for summary in summaries]) for name in _SUMMARY},
    }


_SUMMARY = ("parameters", "active_parameters", "flops_per_token", "tokens", "tokens_per_second", "peak_memory_bytes")


def _role(suite: Suite, label: str) -> str:
    if label in suite.reference:
        return "reference"
    if label == suite.control:
        return "control"
    router = _router(suite, label)
    learned = all(training.summary.get("learned", True) for training in suite.of(label))
    return "unknown" if router == "unknown" else "learned" if learned else "fixed"


def _causal(suite: Suite, label: str) -> bool:
    """False if a training says that its router sees later tokens: its loss then is no competitor of the others'."""
    return all(training.summary.get("causal", True) for training in suite.of(label))


def _router(suite: Suite, label: str) -> str:
    known = [training.router for training in suite.of(label) if training.router != "unknown"]
    return known[0] if known else "unknown"


def _lowest(suite: Suite, labels: Sequence[str]) -> str | None:
    losses = {label: _stat([evaluation.loss for evaluation in suite.evaluations(label).values()]) for label in labels}
    finite = {label: stat["mean"] for label, stat in losses.items() if math.isfinite(stat["mean"])}
    return min(finite, key=lambda label: (finite[label], label)) if finite else None


def _paired(suite: Suite, *labels: str | None) -> tuple[list[NDArray[np.float64]], NDArray[np.int64]] | None:
    """The sequence losses [S, N] of the runs over the seeds that all of them finished, and the domains [N]."""
    runs = [suite.evaluations(label) if label is not None else {} for label in labels]
    seeds = [seed for seed in suite.seeds if all(seed in run for run in runs)]
    if not seeds:
        return None
    domain_N = runs[0][seeds[0]].sequence_domain_N
    labelled_N = domain_N >= 0
    losses_SN = [np.stack([run[seed].sequence_loss_N[labelled_N] for seed in seeds]) for run in runs]
    return losses_SN, domain_N[labelled_N]


def _lead(suite: Suite, behind: str | None, reference: str | None) -> Results | None:
    paired = _paired(suite, behind, reference)
    if paired is None:
        return None
    (behind_SN, reference_SN), domain_N = paired
    return {"label": behind, **asdict(gap.lead(behind_SN, reference_SN, domain_N))}


def _recovered(suite: Suite, label: str, best: str | None, domains: Sequence[str]) -> Results:
    """`recovered` overall and by domain; with a reason instead of a value where it is undefined."""
    nothing = {"value": None, "low": None, "high": None, "over": None}
    paired = _paired(suite, suite.control, label, best)
    if paired is None:
        undefined = {**nothing, "undefined": _why_unpaired(suite, label, best)}
        return {"recovered": undefined, "recovered_by_domain": {domain: dict(undefined) for domain in domains}}
    (control_SN, router_SN, reference_SN), domain_N = paired

    def share(chosen_N: NDArray[np.bool_]) -> Results:
        runs_SN = control_SN[:, chosen_N], router_SN[:, chosen_N], reference_SN[:, chosen_N]
        found = gap.recovered(*runs_SN, domain_N[chosen_N])
        return {**asdict(found.share), "undefined": found.undefined}

    return {
        "recovered": share(np.ones(len(domain_N), dtype=bool)),
        "recovered_by_domain": {
            domain: share(domain_N == d) for d, domain in enumerate(domains) if np.any(domain_N == d)
        },
    }


def _why_unpaired(suite: Suite, label: str, best: str | None) -> str:
    if best is None:
        return "no run of the reference finished"
    if suite.control is None or not suite.evaluations(suite.control):
        return "no run of the control finished" if suite.control else "the suite names no control"
    if not suite.evaluations(label):
        return "no run finished"
    return "no seed finished in the run, the control and the reference"


def _routing(evaluations: list[Evaluation]) -> Results:
    """form -> metric -> mean, spread and layers."""
    tables: dict[str, Callable[[Evaluation], NDArray[np.int64]]] = {
        "top_1": lambda evaluation: evaluation.counts_top_1_YDE,
        "top_k": lambda evaluation: evaluation.counts_top_k_YDE,
    }
    if any(evaluation.dropped_YDE.any() for evaluation in evaluations):
        tables["top_k_kept"] = lambda evaluation: evaluation.counts_top_k_YDE - evaluation.dropped_YDE

    def of_layers(
        metric: Callable[[NDArray[np.int64]], float], table: Callable[[Evaluation], NDArray[np.int64]]
    ) -> Callable[[Evaluation], list[float]]:
        return lambda evaluation: [metric(counts_DE) for counts_DE in table(evaluation)]

    routing: Results = {
        form: {name: _layered(evaluations, of_layers(metric, table)) for name, metric in METRICS.items()}
        for form, table in tables.items()
    }
    shuffled = of_layers(metrics.domain_information, lambda evaluation: evaluation.shuffled_counts_top_k_YDE)
    routing["top_k"]["domain_information_shuffled"] = _layered(evaluations, shuffled)
    routing["top_k"]["domain_information_above_shuffled"] = _layered(evaluations, _above_shuffled)
    return routing


def _above_shuffled(evaluation: Evaluation) -> list[float]:
    tables = zip(evaluation.counts_top_k_YDE, evaluation.shuffled_counts_top_k_YDE, strict=True)
    return [metrics.above_shuffled(counts_DE, shuffled_DE) for counts_DE, shuffled_DE in tables]


def _experts_per_token(evaluation: Evaluation) -> list[float]:
    return [float(counts_DE.sum() / evaluation.tokens) for counts_DE in evaluation.counts_top_k_YDE]


def _drop_rates(evaluation: Evaluation, domain: int | None = None) -> list[float]:
    """Of each layer; over domains of equal weight, or of one."""
    chosen = slice(None) if domain is None else slice(domain, domain + 1)
    tables = zip(evaluation.counts_top_k_YDE[:, chosen], evaluation.dropped_YDE[:, chosen], strict=True)
    return [metrics.drop_rate(counts_DE, dropped_DE) for counts_DE, dropped_DE in tables]


def _layered(evaluations: list[Evaluation], of_layers: Callable[[Evaluation], list[float]]) -> Results:
    """The mean over layers, and each layer, over seeds."""
    values = [of_layers(evaluation) for evaluation in evaluations]
    averages = [float(np.mean(layers)) if layers else math.nan for layers in values]
    return {**_stat(averages), "layers": [_stat(list(layer)) for layer in zip(*values, strict=True)]}


def _stat(values: Sequence[float]) -> Results:
    """Mean and sample standard deviation; null where they are not finite."""
    mean = float(np.mean(values)) if values else math.nan
    spread = float(np.std(values, ddof=1)) if len(values) > 1 and math.isfinite(mean) else math.nan
    return {"mean": mean, "spread": spread, "seeds": len(values)}


def _rounded(value: Any) -> Any:
    """The value in plain JSON: floats at nine digits, so that no summation order shows, null where not finite."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{SIGNIFICANT_DIGITS}g}") if math.isfinite(value) else None
    return value


def _csv_rows(run: Results) -> Iterator[tuple[Any, ...]]:
    """One row per number: overall, per layer, per domain."""
    head = (run["label"], run["role"], run["router"])

    def row(quantity: str, stat: Results, form: str = "", layer: object = "", domain: str = "") -> tuple[Any, ...]:
        return (*head, quantity, form, layer, domain, stat["mean"], stat["spread"], stat["seeds"])

    def layered(quantity: str, stat: Results, form: str, domain: str = "") -> Iterator[tuple[Any, ...]]:
        yield row(quantity, stat, form, "mean", domain)
        for layer, layer_stat in enumerate(stat["layers"]):
            yield row(quantity, layer_stat, form, layer, domain)

    for quantity in ("loss", "perplexity", *_SUMMARY):
        yield row(quantity, run[quantity])
    for domain, stat in run["loss_by_domain"].items():
        yield row("loss", stat, domain=domain)
    for domain, share in (("", run["recovered"]), *run["recovered_by_domain"].items()):
        for quantity, bound in (("recovered", "value"), ("recovered_low", "low"), ("recovered_high", "high")):
            yield (*head, quantity, "", "", domain, share[bound], None, run["loss"]["seeds"])
    yield from layered("experts_per_token", run["experts_per_token"], "top_k")
    yield from layered("drop_rate", run["drop_rate"], "top_k")
    for domain, stat in run["drop_rate_by_domain"].items():
        yield from layered("drop_rate", stat, "top_k", domain)
    for form, quantities in run["routing"].items():
        for quantity, stat in quantities.items():
            yield from layered(quantity, stat, form)
