"""The field's metrics of routing, side by side: pure functions over counts, scores, outputs and losses, without torch.

Beside the functions of each module stand their records, which say what each metric means and where it is shown; see
`metric`. docs/metrics.md has them as tables, with examples. Everything public is here: `from moe_testbed.routing import
metrics`, then `metrics.domain_information(counts_DE)`, and all the records in `metrics.METRICS`.
"""

from moe_testbed.routing.metrics import (
    activations,
    agreement,
    bootstrap,
    causal,
    change,
    counts,
    gap,
    scores,
    utilization,
    vocabulary,
)
from moe_testbed.routing.metrics.activations import (
    Pair,
    cka_chance,
    cka_matrix,
    coactivation,
    cosine_matrix,
    effective_rank,
    linear_cka,
    matched_cosine,
    mean_of_pairs,
    mean_share,
    mean_strongest_share,
    strongest_pair,
    weight_cosine_matrix,
)
from moe_testbed.routing.metrics.agreement import (
    Agreement,
    coverage,
    matched_groups,
    matched_purity,
    precision,
    reference_agreement,
    regret,
)
from moe_testbed.routing.metrics.bootstrap import Interval, counts_interval, seeds_interval
from moe_testbed.routing.metrics.causal import (
    ablation_damage,
    damage_matrix,
    forced_matrix,
    other_groups_loss,
    own_group_loss,
    specificity,
    specificity_by_expert,
)
from moe_testbed.routing.metrics.change import (
    choices_kept,
    choices_kept_chance,
    first_choice_kept,
    first_choice_kept_chance,
    fluctuation,
    saturation,
    settled_step,
)
from moe_testbed.routing.metrics.counts import (
    conditional,
    domain_information,
    domain_information_above_shuffled,
    entropy,
    joint,
    load,
    mutual_information,
    nmi_geometric,
    owners,
    purity,
)
from moe_testbed.routing.metrics.gap import Recovered, lead, recovered, why_undefined
from moe_testbed.routing.metrics.metric import COUNTS, Metric
from moe_testbed.routing.metrics.scores import entropy_of_mean, mean_margin, mean_token_entropy, router_cosine
from moe_testbed.routing.metrics.utilization import (
    coefficient_of_variation,
    dead_experts,
    drop_rate,
    effective_experts,
    experts_per_token,
    gini,
    inverse_simpson,
    max_violation,
    normalised_effective_experts,
)
from moe_testbed.routing.metrics.vocabulary import token_information, token_information_chance, vocabulary_share

TOPICS: dict[str, tuple[Metric, ...]] = {
    "loss": gap.METRICS,
    "counts": counts.TABLES,
    "specialization": counts.METRICS,
    "agreement": agreement.METRICS,
    "utilization": utilization.METRICS,
    "router": scores.METRICS,
    "vocabulary": vocabulary.METRICS,
    "redundancy": activations.METRICS,
    "training": change.METRICS,
    "causal": causal.METRICS,
    "intervals": bootstrap.METRICS,
    "cost": utilization.COST,
}
"""The records by topic, in the order in which a report shows them; docs/metrics.md has a table of each topic."""

METRICS: tuple[Metric, ...] = tuple(metric for records in TOPICS.values() for metric in records)
"""All records, those of functions that no report shows included."""

REPORTED: tuple[Metric, ...] = tuple(metric for metric in METRICS if metric.part is not None)
"""The records of the numbers that a report shows."""

__all__ = [
    "COUNTS",
    "METRICS",
    "REPORTED",
    "TOPICS",
    "Agreement",
    "Interval",
    "Metric",
    "Pair",
    "Recovered",
    "ablation_damage",
    "choices_kept",
    "choices_kept_chance",
    "cka_chance",
    "cka_matrix",
    "coactivation",
    "coefficient_of_variation",
    "conditional",
    "cosine_matrix",
    "counts_interval",
    "coverage",
    "damage_matrix",
    "dead_experts",
    "domain_information",
    "domain_information_above_shuffled",
    "drop_rate",
    "effective_experts",
    "effective_rank",
    "entropy",
    "entropy_of_mean",
    "experts_per_token",
    "first_choice_kept",
    "first_choice_kept_chance",
    "fluctuation",
    "forced_matrix",
    "gini",
    "inverse_simpson",
    "joint",
    "lead",
    "linear_cka",
    "load",
    "matched_cosine",
    "matched_groups",
    "matched_purity",
    "max_violation",
    "mean_margin",
    "mean_of_pairs",
    "mean_share",
    "mean_strongest_share",
    "mean_token_entropy",
    "mutual_information",
    "nmi_geometric",
    "normalised_effective_experts",
    "other_groups_loss",
    "own_group_loss",
    "owners",
    "precision",
    "purity",
    "recovered",
    "reference_agreement",
    "regret",
    "router_cosine",
    "saturation",
    "seeds_interval",
    "settled_step",
    "specificity",
    "specificity_by_expert",
    "strongest_pair",
    "token_information",
    "token_information_chance",
    "vocabulary_share",
    "weight_cosine_matrix",
    "why_undefined",
]
