"""What a training keeps as arrays: its evaluations, the probes of its routing, and the ablation of its experts.

The letters behind a name's last underscore are its axes, as in `array_file.LETTERS`. Shape legend: Y MoE layers (0 for
a dense model), D domains, E experts, N evaluated sequences, C clusters of sequences that share a document, V token ids,
T tokens of the probe, W places for choices, S scopes, X kinds of targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.run.array_file import ArrayFile, Values, array
from moe_testbed.launcher.run.steps import step_of

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation(ArrayFile):
    """What a model does on a fixed set of sequences: losses in nats, and counts of assignments before any dropping.

    Attributes:
        step: optimizer steps completed, 0 where they are not known.
        loss_sum_D: over the tokens of a domain.
        sequence_loss_N: mean over a sequence.
        shuffled_counts_top_k_YDE: the same as counts_top_k_YDE, every sequence with the domain of another one: what a
            table shows by chance.
        sequence_domain_N: -1 for a sequence of none.
        sequence_cluster_N, cluster_domain_C: the cluster of each sequence, and the domain of each cluster.
        weight_YDE: sum of the weights of the chosen experts.
        coactivation_YEE: tokens that use both experts.
        entropy_sum_YD, probability_sum_YDE, margin_sum_YD: sums over tokens, of routers that make probabilities.
        router_cosine_YEE: between the vectors that stand for the experts.
        vocabulary_ids_V, vocabulary_counts_YVE: first choices of the most frequent token ids.
        correct_D: targets that had the highest logit.
        kinds: kinds of targets, of an objective that tells them apart, and kind_tokens_X, kind_loss_sum_X,
            kind_correct_X: the number of each, its loss and those that had the highest logit.
        violation_sum_SY: sum over tokens of the max violation of the sequence and of the document that they are in.
        routed_tokens_YD: tokens that each layer has routed, where they are not those that were to be predicted.
    """

    step: int = array(values=Values.WHOLE)
    domains: tuple[str, ...] = array("domain", values=Values.NAMES)
    counts_top_k_YDE: Integers = array("layer", "domain", "expert", values=Values.COUNTS)
    sequence_loss_N: Floats = array("sequence")
    tokens_D: Integers = array("domain", values=Values.WHOLE)
    loss_sum_D: Floats = array("domain")
    sequence_domain_N: Integers = array("sequence", values=Values.DOMAINS)
    counts_top_1_YDE: Integers = array("layer", "domain", "expert", values=Values.COUNTS)
    dropped_YDE: Integers = array("layer", "domain", "expert", values=Values.COUNTS)
    shuffled_counts_top_k_YDE: Integers = array("layer", "domain", "expert", values=Values.COUNTS)
    sequence_cluster_N: Integers | None = array("sequence", values=Values.WHOLE, optional=True)
    cluster_domain_C: Integers | None = array("cluster", values=Values.DOMAINS, optional=True)
    cluster_counts_YCE: Integers | None = array("layer", "cluster", "expert", values=Values.COUNTS, optional=True)
    weight_YDE: Floats | None = array("layer", "domain", "expert", optional=True)
    coactivation_YEE: Integers | None = array("layer", "expert", "expert", values=Values.WHOLE, optional=True)
    entropy_sum_YD: Floats | None = array("layer", "domain", optional=True)
    probability_sum_YDE: Floats | None = array("layer", "domain", "expert", optional=True)
    margin_sum_YD: Floats | None = array("layer", "domain", optional=True)
    router_cosine_YEE: Floats | None = array("layer", "expert", "expert", stored_as="float32", optional=True)
    vocabulary_ids_V: Integers | None = array("token id", values=Values.WHOLE, optional=True)
    vocabulary_counts_YVE: Integers | None = array("layer", "token id", "expert", values=Values.COUNTS, optional=True)
    violation_sum_SY: Floats | None = array("scope", "layer", optional=True)
    correct_D: Integers | None = array("domain", values=Values.COUNTS, optional=True)
    kinds: tuple[str, ...] | None = array("kind", values=Values.NAMES, optional=True)
    kind_tokens_X: Integers | None = array("kind", values=Values.COUNTS, optional=True)
    kind_loss_sum_X: Floats | None = array("kind", optional=True)
    kind_correct_X: Integers | None = array("kind", values=Values.COUNTS, optional=True)
    routed_tokens_YD: Integers | None = array("layer", "domain", values=Values.COUNTS, optional=True)

    @property
    def layer_tokens_YD(self) -> Integers:
        """The tokens that each layer has routed."""
        if self.routed_tokens_YD is not None:
            return self.routed_tokens_YD
        return np.broadcast_to(self.tokens_D, (len(self.counts_top_k_YDE), len(self.tokens_D)))

    @property
    def loss_D(self) -> Floats:
        """The loss in nats per token of each domain."""
        loss_D: Floats = self.loss_sum_D / self.tokens_D
        return loss_D

    @property
    def loss(self) -> float:
        """The loss in nats per token, the mean over domains of equal weight."""
        return float(self.loss_D.mean())

    def of_kinds(self) -> list[tuple[str, int, float, int]]:
        """Returns of each kind of targets its name, their number, the sum of their losses in nats, and how many of them
        had the highest logit; without those of which there is none."""
        parts = self.kind_tokens_X, self.kind_loss_sum_X, self.kind_correct_X
        if self.kinds is None or any(part is None or len(part) != len(self.kinds) for part in parts):
            return []
        rows = zip(self.kinds, *parts, strict=True)  # type: ignore[arg-type]
        return [(kind, int(tokens), float(loss), int(correct)) for kind, tokens, loss, correct in rows if tokens]

    @property
    def tokens(self) -> int:
        """How many tokens all domains have together."""
        return int(self.tokens_D.sum())


@dataclass(frozen=True)
class RoutingProbe(ArrayFile):
    """The routing after one optimizer step.

    Attributes:
        step: optimizer steps completed.
        expert_ids_YTW: choices of the probe's tokens, -1 for none.
        domain_T: domain of each of these tokens.
        counts_top_k_YDE: assignments of that step's training batch.
    """

    step: int = array(values=Values.WHOLE)
    expert_ids_YTW: Integers = array("layer", "probe token", "choice", values=Values.WHOLE, stored_as="int16")
    counts_top_k_YDE: Integers | None = array("layer", "domain", "expert", values=Values.COUNTS, optional=True)
    domains: tuple[str, ...] | None = array("domain", values=Values.NAMES, optional=True)
    domain_T: Integers | None = array("probe token", values=Values.WHOLE, stored_as="int16", optional=True)


@dataclass(frozen=True)
class Ablation(ArrayFile):
    """What a sample of sequences loses when experts are barred, replaced or swapped, and how alike experts are.

    Losses are means over a sequence, in nats per token; nan where an expert was not part of the sample.

    Attributes:
        sequence_domain_N: domain of each sequence of the sample.
        baseline_loss_N: the loss of the model as it is.
        owner_YE: domain that uses the expert most.
        group_YE: domain that the expert is matched to.
        ablation_loss_YEN: the loss with the expert barred, so that its tokens choose again.
        mean_loss_YEN: the loss with the expert's output replaced by its mean.
        forced_loss_DN: the loss with all tokens sent to the domain's experts.
        expert_cosine_YEE, expert_cka_YEE: between outputs for the same `redundancy_tokens` tokens.
        effective_rank_Y: the effective rank of these outputs.
        weight_cosine_YEE: between the weights, neurons matched.
    """

    domains: tuple[str, ...] = array("domain", values=Values.NAMES)
    baseline_loss_N: Floats = array("sequence")
    sequence_domain_N: Integers = array("sequence", values=Values.DOMAINS)
    owner_YE: Integers | None = array("layer", "expert", values=Values.DOMAINS, optional=True)
    group_YE: Integers | None = array("layer", "expert", values=Values.DOMAINS, optional=True)
    ablation_loss_YEN: Floats | None = array("layer", "expert", "sequence", stored_as="float32", optional=True)
    mean_loss_YEN: Floats | None = array("layer", "expert", "sequence", stored_as="float32", optional=True)
    forced_loss_DN: Floats | None = array("domain", "sequence", stored_as="float32", optional=True)
    expert_cosine_YEE: Floats | None = array("layer", "expert", "expert", stored_as="float32", optional=True)
    expert_cka_YEE: Floats | None = array("layer", "expert", "expert", stored_as="float32", optional=True)
    effective_rank_Y: Floats | None = array("layer", optional=True)
    weight_cosine_YEE: Floats | None = array("layer", "expert", "expert", stored_as="float32", optional=True)
    redundancy_tokens: int | None = array(values=Values.WHOLE, optional=True)


def read_probe(path: Path) -> RoutingProbe:
    """Returns a probe of the routing, whole. Raises one of `DAMAGED`."""
    found, left_out = RoutingProbe.read(path)
    if left_out:
        raise ValueError(left_out[0])
    if found.step != step_of(path):
        raise ValueError(f"it is of step {found.step}")
    return found
