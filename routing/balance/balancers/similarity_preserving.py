"""Similar tokens get similar scores."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.routing.balance.balancer import (
    BALANCERS,
    Balancer,
    BalancerConfig,
    RoutedBatch,
    Schedule,
    carried,
    mean_over_layers,
)
from moe_testbed.routing.router import Capability


class SimilarityPreservingConfig(BalancerConfig):
    """Options of ``similarity_preserving``."""

    name: str = "similarity_preserving"
    coefficient: Schedule = 0.1

    @property
    def needs(self) -> frozenset[Capability]:
        """The loss is one of the router's vectors."""
        return frozenset({Capability.VECTORS})


def similarity_preserving(vectors_EX: Tensor) -> Tensor:
    """``L = ||R R^T - I||_1 / E``, the sum of absolute entries per expert, R the experts' vectors (SimBal, Omi et al.,
    arXiv 2506.14038, there without 1 / E).

    0 for orthonormal vectors, which keep the angles between tokens in their scores and so leave no direction that all
    tokens share to one expert; 1 for vectors of zeros, E - 1 for E equal unit vectors, whatever E. More experts than
    dimensions cannot be orthonormal: the loss then stays above 0. It reads no token, so it has no balancing scope.

    Returns:
        Scalar, float32.
    """
    vectors_EX = vectors_EX.to(torch.promote_types(vectors_EX.dtype, torch.float32))
    gram_EE = vectors_EX @ vectors_EX.T
    identity_EE = torch.eye(len(gram_EE), dtype=gram_EE.dtype, device=gram_EE.device)
    return (gram_EE - identity_EE).abs().sum() / len(gram_EE)


@BALANCERS.register("similarity_preserving")
class SimilarityPreserving(Balancer):
    """:func:`similarity_preserving` of every layer's router."""

    Config = SimilarityPreservingConfig
    config: SimilarityPreservingConfig

    def loss(self, batch: RoutedBatch) -> Tensor:
        vectors = carried(decision.vectors_EX for decision in batch.decisions)
        return mean_over_layers([similarity_preserving(vectors_EX) for vectors_EX in vectors])
