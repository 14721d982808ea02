"""What experts do, from the losses of a sample of sequences under interventions on the routing.

Shape legend: D domains, E experts, N evaluated sequences, X rows of any kind, Z resamples. Losses are nats per token of
each sequence; `domain_N` is the domain of each, -1 for none, which is left out. A domain without sequences gives nan.
`gap.lead(loss under the intervention, baseline_loss_N, domain_N, cluster_N)` is the interval of a change.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe_testbed.routing.metrics.counts import FloatArray
from moe_testbed.routing.metrics.metric import Metric


def damage_matrix(ablation_loss_EN: ArrayLike, baseline_loss_N: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """Returns by how much domain d's loss rises without expert e, in nats per token [E, D]; below 0 where it falls.

    The expert is barred and its tokens choose anew among the others, or its output is replaced by its mean: the
    formula is the same. Rows of experts that were not tried are nan and stay nan. Blind to experts that stand in for
    one another: each of two equal experts seems useless.
    """
    losses_EN, domains = _losses(ablation_loss_EN, domain_N)
    changes_EN = losses_EN - np.asarray(baseline_loss_N, dtype=np.float64)
    return _means_by_domain(changes_EN, domains, int(domains.max()) + 1)


def specificity_by_expert(damage_ED: ArrayLike, owner_E: ArrayLike) -> FloatArray:
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


def specificity(damage_ED: ArrayLike, owner_E: ArrayLike) -> float:
    """The own domains' share of all damage: `specificity_by_expert`, each expert weighted by the damage of losing it.

    0 to 1; nan where no expert's loss does damage. Blind to the many experts that matter little.
    """
    share_E, total_E = specificity_by_expert(damage_ED, owner_E), _damage(damage_ED).sum(axis=1)
    known_E = ~np.isnan(share_E)
    return float(np.average(share_E[known_E], weights=total_E[known_E])) if known_E.any() else float("nan")


def ablation_damage(damage_ED: ArrayLike, owner_E: ArrayLike) -> float:
    """Mean over experts of the damage to the domain that each serves most; nan where no expert has both.

    Experts that were not tried or have no owner (-1) are left out.
    """
    damage, owners = np.asarray(damage_ED, dtype=np.float64), np.asarray(owner_E, dtype=np.int64)
    own_E = damage[np.arange(len(owners)), owners]
    known_E = (owners >= 0) & ~np.isnan(own_E)
    return float(own_E[known_E].mean()) if known_E.any() else float("nan")


def specificity_of_many(damage_ZED: ArrayLike, owner_E: ArrayLike) -> FloatArray:
    """Returns `specificity` [Z] of many tables of damage [Z, E, D] with the same owners, in one go."""
    damage, owners = np.asarray(damage_ZED, dtype=np.float64), np.asarray(owner_E, dtype=np.int64)
    worse = np.fmax(damage, 0.0)  # as in `_damage`, but an expert that was not tried does no damage: it weighs nothing
    total_ZE, own_ZE = worse.sum(axis=2), worse[:, np.arange(len(owners)), owners]
    total_Z, own_Z = (values_ZE[:, owners >= 0].sum(axis=1) for values_ZE in (total_ZE, own_ZE))
    return np.divide(own_Z, total_Z, out=np.full_like(total_Z, np.nan), where=total_Z > 0)


def ablation_damage_of_many(damage_ZED: ArrayLike, owner_E: ArrayLike) -> FloatArray:
    """Returns `ablation_damage` [Z] of many tables of damage [Z, E, D] with the same owners, in one go."""
    damage, owners = np.asarray(damage_ZED, dtype=np.float64), np.asarray(owner_E, dtype=np.int64)
    own_ZE = damage[:, np.arange(len(owners)), owners][:, owners >= 0]
    known_ZE = ~np.isnan(own_ZE)
    sum_Z, number_Z = np.where(known_ZE, own_ZE, 0.0).sum(axis=1), known_ZE.sum(axis=1)
    return np.divide(sum_Z, number_Z, out=np.full_like(sum_Z, np.nan), where=number_Z > 0)


def forced_matrix(forced_loss_DN: ArrayLike, baseline_loss_N: ArrayLike, domain_N: ArrayLike) -> FloatArray:
    """Returns by how much domain d's loss (row) rises when all may use only domain g's experts (column), [D, D].

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
    """The mean [X, D] of each row over the sequences of each domain."""
    of_domain_DN = np.arange(num_domains)[:, None] == domain_N
    means = [
        values_XN[:, of_N].mean(axis=1) if of_N.any() else np.full(len(values_XN), np.nan) for of_N in of_domain_DN
    ]
    return np.stack(means, axis=1)


def _damage(damage_ED: ArrayLike) -> FloatArray:
    """Returns what makes a loss worse; the nan of domains without sequences counts as 0, that of an expert stays."""
    damage = np.asarray(damage_ED, dtype=np.float64)
    return np.where(np.isnan(damage).all(axis=1, keepdims=True), np.nan, np.fmax(damage, 0.0))


METRICS = (
    Metric(
        name="damage_matrix",
        function=damage_matrix,
        question="What does domain d lose without expert e?",
        formula="mean over d's sequences of L_without − L",
        range="nats per token; below 0 is a gain",
        blind_to="experts that stand in for one another",
    ),
    Metric(
        name="specificity_by_expert",
        function=specificity_by_expert,
        question="Is it its own domain that an expert is good for?",
        formula="own domain's share of the damage above 0",
        range="0 to 1; the own domain's share of its tokens if all of them suffer alike",
        blind_to="how large the damage is",
    ),
    Metric(
        name="specificity",
        title="Specificity",
        function=specificity,
        of_many=specificity_of_many,
        of=("ablation_damage_YED", "owner_YE"),
        part="causes",
        question="Is it their own domain that experts are good for?",
        formula="Σ damage to the domain that the barred expert serves most / Σ damage to all domains",
        range="0 to 1; purity if all tokens of an expert suffer alike",
        blind_to="how large the damage is: noise alone gives about 1/D; the many experts that matter little",
        note="It is of the damage above 0 that barring one expert at a time does, on a sample. Compare it with purity, "
        "the share of its tokens that an expert gets from that domain.",
        axis="specificity",
        tracked=True,
    ),
    Metric(
        name="ablation_damage",
        title="Damage without an expert",
        function=ablation_damage,
        of_many=ablation_damage_of_many,
        of=("ablation_damage_YED", "owner_YE"),
        part="causes",
        question="What does the domain that an expert serves most lose without it?",
        formula="mean over experts e of L without e − L, on the domain that e serves most",
        range="nats per token; below 0 where the loss falls",
        blind_to="experts that stand in for one another",
        note="The expert is barred in its layer and its tokens choose anew.",
        digits=3,
        axis="damage without\nan expert (nats)",
    ),
    Metric(
        name="mean_replacement_damage",
        title="Damage by its mean",
        function=ablation_damage,
        of_many=ablation_damage_of_many,
        of=("mean_damage_YED", "owner_YE"),
        part="causes",
        question="What does that domain lose when the expert returns its mean for every token?",
        formula="as damage without an expert, its output replaced by its mean over the tokens that use it",
        range="nats per token; below 0 where the loss falls",
        blind_to="experts that stand in for one another",
        note="It keeps the choice and removes what depends on the token; barred, the token chooses again. Either may "
        "cost more.",
        digits=3,
        axis="damage by its\nmean (nats)",
    ),
    Metric(
        name="forced_matrix",
        function=forced_matrix,
        question="What does d lose in the hands of g's experts?",
        formula="mean over d's sequences of L_forced to g − L",
        range="nats per token, row d, column g",
        blind_to="single layers: all are forced at once",
    ),
    Metric(
        name="own_group_loss",
        function=own_group_loss,
        question="What is a sequence's loss with its own group only?",
        formula="L of each sequence, forced to its own domain's group",
        range="nats per token",
        blind_to="single layers: all are forced at once",
    ),
    Metric(
        name="other_groups_loss",
        function=other_groups_loss,
        question="And with the others'?",
        formula="L of each sequence, mean over the other groups",
        range="nats per token",
        blind_to="which other group",
    ),
    Metric(
        name="keep_only_group",
        title="Own group only",
        part="causes",
        question="What does it cost to be kept to one's own domain's experts?",
        formula="L when every token may use only the experts matched to its domain − L",
        range="nats per token",
        blind_to="single layers: all are forced at once",
        note="A router that reads the label is told this domain's; the control ignores what it is told.",
        digits=3,
    ),
    Metric(
        name="forced_elsewhere",
        title="Others' groups only",
        part="causes",
        question="What is it worth which experts a domain uses?",
        formula="L when every token may use only another domain's experts − L, mean over the other domains",
        range="nats per token",
        blind_to="which other domain; forced_matrix has all pairs",
        note="A router that reads the label is told another domain's; the control ignores what it is told.",
        digits=3,
    ),
)
