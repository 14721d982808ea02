"""All routers. A new one is a file here and its name in the two lists below; CONTRIBUTING.md has the other steps."""

from moe_testbed.routing.routers import (
    base,
    cosine,
    expert_choice,
    expert_threshold,
    frozen,
    group_limited,
    hash,
    mlp,
    noisy_top_k,
    permuted_reference,
    quantile,
    random,
    reference,
    relu,
    sigmoid,
    sinkhorn,
    top_k,
    top_k_softmax,
    top_p,
)
from moe_testbed.routing.routers.parts.former_names import keep_former_names

__all__ = [
    "base",
    "cosine",
    "expert_choice",
    "expert_threshold",
    "frozen",
    "group_limited",
    "hash",
    "mlp",
    "noisy_top_k",
    "permuted_reference",
    "quantile",
    "random",
    "reference",
    "relu",
    "sigmoid",
    "sinkhorn",
    "top_k",
    "top_k_softmax",
    "top_p",
]

keep_former_names()
