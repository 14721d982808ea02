"""All routers. A new one is a file here and a line below."""

from moe_testbed.routing.routers import (
    frozen,
    hash,
    permuted_reference,
    random,
    reference,
    sigmoid,
    top_k,
    top_k_softmax,
)

__all__ = ["frozen", "hash", "permuted_reference", "random", "reference", "sigmoid", "top_k", "top_k_softmax"]
