"""All balancers. A new one is a file here and its name in the two lists below; CONTRIBUTING.md has the other steps."""

from moe_testbed.routing.balance.balancers import (
    entropy,
    importance,
    l1_sparsity,
    load,
    load_balancing_loss,
    loss_free_bias,
    orthogonality,
    similarity_preserving,
    variance,
    z_loss,
)

__all__ = [
    "entropy",
    "importance",
    "l1_sparsity",
    "load",
    "load_balancing_loss",
    "loss_free_bias",
    "orthogonality",
    "similarity_preserving",
    "variance",
    "z_loss",
]
