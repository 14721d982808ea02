"""Partition of the experts into one group per domain, the structure of the reference router."""

from __future__ import annotations

import torch
from torch import Tensor


def group_sizes(num_experts: int, shares: tuple[float, ...], smallest: int) -> list[int]:
    """Number of experts of every group, proportional to ``shares`` by largest remainder, none below ``smallest``.

    Args:
        num_experts: E, the sum of the sizes.
        shares: one positive number per group.
        smallest: experts that each group needs at least (K).

    Raises:
        ValueError: the groups need more experts than there are.
    """
    if smallest * len(shares) > num_experts:
        raise ValueError(
            f"{len(shares)} domains with at least {smallest} experts each need {smallest * len(shares)} experts, but "
            f"model.moe.num_experts is {num_experts}; "
            "use more experts, a smaller model.moe.top_k, or a mix with fewer domains"
        )
    spare = num_experts - smallest * len(shares)
    total = sum(shares)
    exact = [max(share / total * num_experts - smallest, 0.0) for share in shares]
    scale = spare / sum(exact) if sum(exact) > 0 else 0.0
    exact = [value * scale for value in exact]
    sizes = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda d: (sizes[d] - exact[d], d))
    for d in by_remainder[: spare - sum(sizes)]:
        sizes[d] += 1
    return [smallest + size for size in sizes]


def group_masks(sizes: list[int]) -> Tensor:
    """Which experts belong to which group, bool [D, E]; groups are consecutive."""
    owner_E = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return owner_E[None, :] == torch.arange(len(sizes))[:, None]
