"""What experts do, from the losses of a sample of sequences under interventions on the routing.

Shape legend: D domains, E experts, N evaluated sequences, X rows of any kind. Losses are nats per token of each
sequence; `domain_N` is the domain of each, -1 for none, which is left out. A domain without sequences gives nan.
`gap.lead(loss under the intervention, baseline_loss_N, domain_N, cluster_N)` is the interval of a change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.counts import FloatArray


def ablation_damage(ablation_loss_EN: ArrayLike, baseline_loss_N: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """By how much domain d's loss rises without expert e, in nats per token [E, D]; below 0 where it falls.

    The expert is barred and its tokens choose anew among the others, or its output is replaced by its mean: the
    formula is the same. Rows of experts that were not tried are nan and stay nan. Blind to experts that stand in for
    one another: each of two equal experts seems useless.
    """
    losses_EN, domains = _losses(ablation_loss_EN, domain_N)
    changes_EN = losses_EN - np.asarray(baseline_loss_N, dtype=np.float64)
    return _means_by_domain(changes_EN, domains, int(domains.max()) + 1)


def specificity(damage_ED: ArrayLike, owner_E: ArrayLike) -> FloatArray:
    """The own domain's share [E] of the damage that the loss of an expert does, 0 to 1.

    To be compared with the own domain's share of the expert's tokens, which `purity` averages over experts: damage that
    falls on all its tokens alike has that share.

    owner_E: domain of each expert, by `owners` or `matched_groups`. Only what makes a loss worse counts as damage. nan
    where there is none, where the expert was not tried or has no owner (-1). Blind to how large the damage is, and the
    share of an expert that does next to none is noise.
    """
    damage_ED = _damage(damage_ED)
    owners = np.asarray(owner_E, dtype=np.int64)
    if owners.shape != damage_ED.shape[:1] or np.any(owners >= damage_ED.shape[1]):
        raise ValueError(
            f"owner_E must give each of {len(damage_ED)} experts one of {damage_ED.shape[1]} domains, got {owners}"
        )
    total_E = damage_ED.sum(axis=1)
    own_E = damage_ED[np.arange(len(damage_ED)), owners]
    return np.divide(own_E, total_E, out=np.full_like(own_E, np.nan), where=(total_E > 0) & (owners >= 0))


def mean_specificity(damage_ED: ArrayLike, owner_E: ArrayLike) -> float:
    """The own domains' share of all damage: `specificity`, each expert weighted by the damage that its loss does.

    0 to 1; nan where no expert's loss does damage. Blind to the many experts that matter little.
    """
    share_E, total_E = specificity(damage_ED, owner_E), _damage(damage_ED).sum(axis=1)
    known_E = ~np.isnan(share_E)
    return float(np.average(share_E[known_E], weights=total_E[known_E])) if known_E.any() else float("nan")


def forced_matrix(forced_loss_DN: ArrayLike, baseline_loss_N: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """By how much the loss of domain d's tokens (row) rises when all may use only domain g's experts (column), [D, D].

    forced_loss_DN: row g, every token is kept to group g in all layers; a nan row gives a nan column. The diagonal is
    the price of keeping only one's own group. Blind to layers: all are forced at once.
    """
    losses_DN, domains = _forced_losses(forced_loss_DN, domain_N)
    changes_DN = losses_DN - np.asarray(baseline_loss_N, dtype=np.float64)
    return _means_by_domain(changes_DN, domains, len(losses_DN)).T


def own_group_loss(forced_loss_DN: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """The loss [N] of each sequence kept to its own domain's experts (keep-only-group); nan without a domain."""
    losses_DN, domains = _forced_losses(forced_loss_DN, domain_N)
    return np.where(domains >= 0, losses_DN[domains, np.arange(len(domains))], np.nan)


def other_groups_loss(forced_loss_DN: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """The loss [N] of each sequence kept to another domain's experts, mean over the others; nan without a domain.

    nan rows of forced_loss_DN are left out; nan if no other remains.
    """
    losses_DN, domains = _forced_losses(forced_loss_DN, domain_N)
    other_DN = (np.arange(len(losses_DN))[:, None] != domains) & ~np.isnan(losses_DN) & (domains >= 0)
    num_others_N = other_DN.sum(axis=0)
    sum_N = np.where(other_DN, losses_DN, 0.0).sum(axis=0)
    return np.divide(sum_N, num_others_N, out=np.full_like(sum_N, np.nan), where=num_others_N > 0)


def _losses(losses: ArrayLike, domain_N: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    rows, domains = np.asarray(losses, dtype=np.float64), np.asarray(domain_N, dtype=np.int64)
    if rows.ndim != 2 or domains.shape != rows.shape[1:] or not np.any(domains >= 0):
        raise ValueError(
            "there must be losses of sequences, one domain a sequence and one of them at least 0, got shapes "
            f"{rows.shape} and {domains.shape}"
        )
    return rows, domains


def _forced_losses(forced_loss_DN: ArrayLike, domain_N: ArrayLike) -> tuple[FloatArray, NDArray[np.int64]]:
    losses_DN, domains = _losses(forced_loss_DN, domain_N)
    if domains.max() >= len(losses_DN):
        raise ValueError(f"forced_loss_DN must have one row a domain, got {len(losses_DN)} for domain {domains.max()}")
    return losses_DN, domains


def _means_by_domain(values_XN: FloatArray, domain_N: NDArray[np.int64], num_domains: int) -> FloatArray:
    """[X, D]."""
    of_domain_DN = np.arange(num_domains)[:, None] == domain_N
    means = [
        values_XN[:, of_N].mean(axis=1) if of_N.any() else np.full(len(values_XN), np.nan) for of_N in of_domain_DN
    ]
    return np.stack(means, axis=1)


def _damage(damage_ED: ArrayLike) -> FloatArray:
    """What makes a loss worse; the nan of domains without sequences counts as none, that of an expert as nan."""
    damage = np.asarray(damage_ED, dtype=np.float64)
    return np.where(np.isnan(damage).all(axis=1, keepdims=True), np.nan, np.fmax(damage, 0.0))
