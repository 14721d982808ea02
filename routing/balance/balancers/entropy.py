"""Decided tokens, undecided batches."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from moe_testbed.routing.balance.balancer import BALANCERS, RoutedBatch, Schedule, carried
from moe_testbed.routing.balance.means import MeansBalancer, MeansBalancerConfig


class EntropyConfig(MeansBalancerConfig):
    """Options of ``entropy``."""

    name: str = "entropy"
    coefficient: Schedule = 0.01
    token_weight: float = Field(1.0, ge=0, description="a: weight of each token's entropy, which falls")
    batch_weight: float = Field(1.0, ge=0, description="b: weight of the balance set's entropy, which rises")


def normalised_entropy(probabilities_XE: Tensor) -> Tensor:
    """``-sum_i p_i log p_i / log E`` of each row: 0 for one expert, 1 for all alike. Float32 [X]."""
    # log of the smallest number instead of log 0: the gradient stays finite where a probability has underflowed.
    logs_XE = probabilities_XE.clamp(min=torch.finfo(probabilities_XE.dtype).tiny).log()
    return -(probabilities_XE * logs_XE).sum(-1) / math.log(max(probabilities_XE.shape[-1], 2))


@BALANCERS.register("entropy")
class Entropy(MeansBalancer):
    """``L = a mean_t H(p_t) - b sum_G share_G H(P_G)`` with ``P_G`` the mean of ``p_t`` over balance set G and H of
    :func:`normalised_entropy`.

    At least -b, when every token is decided and every set spread evenly. With a = b = 1 it is minus the mutual
    information of token and expert within the set, over log E, and at most 0, when all tokens of a set are alike
    (always so in scope ``token``). Source: LIMoE (arXiv 2206.02770, section 2.2), the local and the global entropy
    loss, there per modality and with a threshold for the global one.
    """

    Config = EntropyConfig
    config: EntropyConfig

    def token_values(self, batch: RoutedBatch) -> list[Tensor]:
        probabilities = carried(decision.probabilities_TE for decision in batch.decisions)
        return [torch.cat([normalised_entropy(p_TE)[:, None], p_TE], dim=1) for p_TE in probabilities]

    def loss_of_means(self, means_YGX: Tensor) -> Tensor:
        of_tokens_YG, of_sets_YG = means_YGX[..., 0], normalised_entropy(means_YGX[..., 1:])
        return self.config.token_weight * of_tokens_YG - self.config.batch_weight * of_sets_YG
