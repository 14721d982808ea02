"""The gap to the reference router: how much of the reference's lead over its control a router recovers.

    recovered = (L_control - L_router) / (L_control - L_reference)

L is the validation loss in nats per token, the mean over domains of equal weight. The control has the reference's
structure and none of its information, so the denominator is what knowing the domains is worth, and a router is asked
how much of that it finds by itself: 0 is the control, 1 the reference, above 1 better than the reference.

Noise is estimated by the percentile bootstrap, paired, since all runs see the same seeds and the same evaluation
sequences: over seeds where there are at least two, else over evaluation sequences within each domain. Over few seeds
the interval is close to their range, not to its nominal level; over sequences it leaves out the noise of training.

Shapes: S seeds, N evaluation sequences, R resamples, A runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics import FloatArray

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with the bounds of its bootstrap interval, and over what was resampled."""

    value: float
    low: float
    high: float
    over: str


@dataclass(frozen=True)
class Recovered:
    """`share` of the reference's `lead` over its control, or the reason why the share is undefined."""

    share: Interval
    lead: Interval
    undefined: str | None


def lead(behind_SN: ArrayLike, ahead_SN: ArrayLike, domain_N: ArrayLike) -> Interval:
    """L_behind - L_ahead in nats per token, with its interval.

    behind_SN, ahead_SN: mean loss of each evaluation sequence under each seed, paired in both dimensions.
    domain_N: domain of each sequence, at least 0. Raises ValueError where the shapes do not fit.
    """
    losses_ASN, domains = _paired(domain_N, behind_SN, ahead_SN)
    means_A, resampled_RA, over = _bootstrap(losses_ASN, domains)
    return _interval(float(means_A[0] - means_A[1]), resampled_RA[:, 0] - resampled_RA[:, 1], over)


def recovered(control_SN: ArrayLike, router_SN: ArrayLike, reference_SN: ArrayLike, domain_N: ArrayLike) -> Recovered:
    """The share of the reference's lead over the control that the router recovers; see the module's docstring.

    Undefined (nan, with the reason) when the lower bound of the lead is not above 0: the denominator is then within
    its noise, or the reference does not lead at all. Arguments as in `lead`.
    """
    losses_ASN, domains = _paired(domain_N, control_SN, router_SN, reference_SN)
    means_A, resampled_RA, over = _bootstrap(losses_ASN, domains)
    lead_R = resampled_RA[:, 0] - resampled_RA[:, 2]
    reference_lead = _interval(float(means_A[0] - means_A[2]), lead_R, over)
    undefined = why_undefined(reference_lead) or (None if np.isfinite(means_A[1]) else "its loss is not finite")
    if undefined:
        return Recovered(Interval(float("nan"), float("nan"), float("nan"), over), reference_lead, undefined)
    gain_R = resampled_RA[:, 0] - resampled_RA[:, 1]
    # Resamples in which the reference does not lead lie beyond the interval's lower bound; they have no share.
    share_R = gain_R[lead_R > 0] / lead_R[lead_R > 0]
    share = float((means_A[0] - means_A[1]) / (means_A[0] - means_A[2]))
    return Recovered(_interval(share, share_R, over), reference_lead, None)


def why_undefined(reference_lead: Interval) -> str | None:
    """Why `recovered` has no denominator under this lead of the reference over its control, or None if it has one."""
    if not np.isfinite(reference_lead.value):
        return "the reference's or its control's loss is not finite"
    bounds = f"[{reference_lead.low:.4f}, {reference_lead.high:.4f}] over {reference_lead.over}"
    if reference_lead.value <= 0:
        return f"the reference does not lead its control ({reference_lead.value:+.4f} nats per token, {bounds})"
    if not reference_lead.low > 0:
        return f"the reference's lead of {reference_lead.value:.4f} nats per token is within its noise {bounds}"
    return None


def _paired(domain_N: ArrayLike, *losses_SN: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    runs = [np.atleast_2d(np.asarray(losses, dtype=np.float64)) for losses in losses_SN]
    domains = np.asarray(domain_N, dtype=np.int64)
    shapes = sorted({run.shape for run in runs})
    if len(shapes) != 1 or shapes[0][1:] != domains.shape or not domains.size:
        raise ValueError(
            f"losses must be paired, seeds x sequences with one domain a sequence, got {shapes} and {domains.shape}"
        )
    return np.stack(runs), domains


def _bootstrap(losses_ASN: FloatArray, domain_N: NDArray[np.int64]) -> tuple[FloatArray, FloatArray, str]:
    """The losses [A] of the runs, the same in R resamples [R, A], and over what they were resampled."""
    rng = np.random.default_rng(0)
    per_domain = [losses_ASN[:, :, domain_N == domain] for domain in np.unique(domain_N)]
    loss_AS = np.mean([losses.mean(axis=2) for losses in per_domain], axis=0)
    num_seeds = loss_AS.shape[1]
    if num_seeds > 1:
        seeds_RS = rng.integers(0, num_seeds, size=(RESAMPLES, num_seeds))
        return loss_AS.mean(axis=1), loss_AS[:, seeds_RS].mean(axis=2).T, "seeds"
    resampled = [
        rng.multinomial(n, np.full(n, 1.0 / n), size=RESAMPLES) @ losses[:, 0].T / n
        for losses in per_domain
        for n in [losses.shape[2]]
    ]
    return loss_AS[:, 0], np.mean(resampled, axis=0), "evaluation sequences"


def _interval(value: float, resampled_R: FloatArray, over: str) -> Interval:
    if not np.isfinite(value):
        return Interval(float("nan"), float("nan"), float("nan"), over)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled_R, [tail, 100 - tail])
    return Interval(value, float(low), float(high), over)
