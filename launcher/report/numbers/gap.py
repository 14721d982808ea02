"""Who is compared with whom, the losses, and the gap to the reference, each with its interval.

Shape legend: I seeds, N evaluated sequences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.values import Results, stat
from moe_testbed.launcher.report.read.arrays import paired_losses
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.routing.metrics import gap

NO_REFERENCE = "the suite names no reference"


def role(suite: Suite, label: str) -> str:
    """Returns reference, control, learned, fixed or unknown."""
    if label in suite.reference:
        return "reference"
    if label == suite.control:
        return "control"
    learned = all(training.summary.learned for training in suite.of(label))
    return "unknown" if router(suite, label) == "unknown" else "learned" if learned else "fixed"


def causal(suite: Suite, label: str) -> bool:
    """Returns False if a training says that its router sees later tokens: its loss then competes with no other."""
    return all(training.summary.causal for training in suite.of(label))


def router(suite: Suite, label: str) -> str:
    """Returns the name of the run's router."""
    known = [training.router for training in suite.of(label) if training.router != "unknown"]
    return known[0] if known else "unknown"


def reference(suite: Suite) -> Results:
    """Returns the best reference, and its leads over its control and over the best of the others."""
    best = _lowest(suite, [label for label in suite.reference if label in suite.descriptions])
    others = [label for label in suite.descriptions if role(suite, label) in ("learned", "fixed")]
    rivals = [label for label in others if causal(suite, label) and _is_one_task(suite, label, best)]
    learned = [label for label in rivals if role(suite, label) == "learned"]
    return {
        "labels": list(suite.reference),
        "best": best,
        "lead_over_control": _lead(suite, suite.control, best),
        "lead_over_best_other": _lead(suite, _lowest(suite, rivals), best),
        "lead_over_best_learned": _lead(suite, _lowest(suite, learned), best),
    }


def losses(suite: Suite, label: str, domains: Sequence[str]) -> Results:
    """Returns loss and perplexity, and the loss by domain. The loss's interval is that of its lead over no loss."""
    evaluations = list(suite.evaluations(label).values())
    values = [evaluation.loss for evaluation in evaluations]
    paired = _paired(suite, label)
    bounds = None
    if paired is not None:
        (loss_IN,), domain_N, cluster_N = paired
        bounds = gap.lead(loss_IN, np.zeros_like(loss_IN), domain_N, cluster_N)
    return {
        "loss": stat(values, bounds),
        "perplexity": stat([math.exp(loss) if loss < 700 else math.inf for loss in values]),
        "loss_by_domain": {
            domain: stat([float(evaluation.loss_D[d]) for evaluation in evaluations])
            for d, domain in enumerate(domains)
        },
    }


def recovered(suite: Suite, label: str, best: str | None, domains: Sequence[str]) -> Results:
    """Returns `recovered` overall and by domain, with a reason instead of a value where it is undefined."""
    nothing = {"value": None, "low": None, "high": None, "over": None}
    paired = _paired(suite, suite.control, label, best) if _is_one_task(suite, label, best) else None
    if paired is None:
        undefined = {**nothing, "undefined": _why_unpaired(suite, label, best)}
        return {"recovered": undefined, "recovered_by_domain": {domain: dict(undefined) for domain in domains}}
    losses_IN, domain_N, cluster_N = paired

    def share(chosen_N: NDArray[np.bool_]) -> Results:
        control_IN, router_IN, reference_IN = (loss_IN[:, chosen_N] for loss_IN in losses_IN)
        clusters = None if cluster_N is None else cluster_N[chosen_N]
        found = gap.recovered(control_IN, router_IN, reference_IN, domain_N[chosen_N], clusters)
        return {**asdict(found.share), "undefined": found.undefined}

    return {
        "recovered": share(np.ones(len(domain_N), dtype=bool)),
        "recovered_by_domain": {
            domain: share(domain_N == d) for d, domain in enumerate(domains) if np.any(domain_N == d)
        },
    }


def _is_one_task(suite: Suite, label: str, other: str | None) -> bool:
    return other is None or {t.task for t in suite.of(label)} == {t.task for t in suite.of(other)}


def _lowest(suite: Suite, labels: Sequence[str]) -> str | None:
    means = {label: stat([e.loss for e in suite.evaluations(label).values()])["mean"] for label in labels}
    finite = {label: mean for label, mean in means.items() if math.isfinite(mean)}
    return min(finite, key=lambda label: (finite[label], label)) if finite else None


def _lead(suite: Suite, behind: str | None, ahead: str | None) -> Results | None:
    paired = _paired(suite, behind, ahead)
    if paired is None:
        return None
    (behind_IN, ahead_IN), domain_N, cluster_N = paired
    return {"label": behind, **asdict(gap.lead(behind_IN, ahead_IN, domain_N, cluster_N))}


def _paired(
    suite: Suite, *labels: str | None
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64] | None] | None:
    """Returns `paired_losses` of the runs over the seeds that all of them finished; None without such a seed."""
    runs = [suite.evaluations(label) if label is not None else {} for label in labels]
    seeds = [seed for seed in suite.seeds if all(seed in run for run in runs)]
    return paired_losses([[run[seed] for seed in seeds] for run in runs]) if seeds else None


def _why_unpaired(suite: Suite, label: str, best: str | None) -> str:
    if not suite.reference:
        return NO_REFERENCE
    if best is None:
        return "no run of the reference finished"
    if not _is_one_task(suite, label, best):
        return "its task is another one than the reference's"
    if suite.control is None or not suite.evaluations(suite.control):
        return "no run of the control finished" if suite.control else "the suite names no control"
    if not suite.evaluations(label):
        return "no run finished"
    return "no seed finished in the run, the control and the reference"
