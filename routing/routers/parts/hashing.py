"""Draws without state: every number is a pure function of integer keys.

A draw that depends on (seed, layer, sequence, position) alone is the same after a restart, under recomputation in the
backward pass, and however the batch is split into ranks and micro-batches.
"""

from __future__ import annotations

import heapq
import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MULTIPLIER_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's ``>>`` on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_keys(*keys: Tensor | int) -> Tensor:
    """SplitMix64 over the keys in turn (Steele, Lea and Flood, OOPSLA 2014).

    Args:
        keys: integers or int64 tensors that broadcast against each other; at least one tensor.

    Returns:
        int64, uniform over all 64-bit patterns.
    """
    device = next(key.device for key in keys if isinstance(key, Tensor))
    state = torch.zeros((), dtype=torch.int64, device=device)
    for key in keys:
        state = state + key + _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _MULTIPLIER_1
        state = (state ^ _shift_right(state, 27)) * _MULTIPLIER_2
        state = state ^ _shift_right(state, 31)
    return state


def uniform_from_keys(*keys: Tensor | int) -> Tensor:
    """Uniform draws in [0, 1), float32, from the top 24 bits of :func:`hash_keys`."""
    return _shift_right(hash_keys(*keys), 40).float() / (1 << 24)


def cumulative_thresholds(shares: tuple[float, ...]) -> Tensor:
    """Where each share ends when [0, 2^24) is divided by ``shares``, int64: what :func:`choice_from_keys` compares
    with. Integers, so that casting a model to bfloat16 leaves them alone."""
    cumulative = torch.tensor(shares, dtype=torch.float64).cumsum(0)
    return (cumulative / cumulative[-1] * (1 << 24)).round().long()


def choice_from_keys(thresholds: Tensor, *keys: Tensor | int) -> Tensor:
    """Index drawn with the probabilities behind ``thresholds``, int64."""
    return torch.searchsorted(thresholds, _shift_right(hash_keys(*keys), 40), right=True)


def modulo_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Token id -> experts by the id's remainder (Hash Layers, arXiv 2106.04426, section 3.1).

    Choice j of token v is expert ``(v + offset + j * stride) mod E``; offset and stride come from the seed, and the
    stride is coprime with E so that the choices differ.

    Returns:
        int64 [V, K].
    """
    generator = torch.Generator().manual_seed(seed)
    coprime = [stride for stride in range(1, num_experts + 1) if math.gcd(stride, num_experts) == 1]
    stride = coprime[int(torch.randint(len(coprime), (), generator=generator))]
    offset = int(torch.randint(num_experts, (), generator=generator))
    ids_V = torch.arange(vocab_size)
    return (ids_V[:, None] + offset + stride * torch.arange(top_k)) % num_experts


def balanced_table(token_weights_V: Tensor, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Token id -> experts with the load as even as a fixed table can make it (Hash Layers, arXiv 2106.04426, section
    3.1, "balanced assignment").

    Tokens are taken from frequent to rare and each is given to the K experts that carry least so far. The order is
    shaken by the seed (each weight times a draw from [0.5, 1.5)), so that layers have different tables.

    Args:
        token_weights_V: frequency of each token id, any scale.

    Returns:
        int64 [V, K]; on the meta device, where a model is only counted, without the work.
    """
    if torch.get_default_device().type == "meta":
        return torch.empty(len(token_weights_V), top_k, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    shaken_V = token_weights_V.double() * (
        0.5 + torch.rand(token_weights_V.shape, generator=generator, dtype=torch.float64)
    )
    order = torch.argsort(shaken_V, descending=True, stable=True).tolist()
    weights = token_weights_V.double().tolist()
    # Ids that never occur still have to be spread, hence the number of ids carried as the second key.
    heap = [(0.0, 0, expert) for expert in range(num_experts)]
    table = [[0] * top_k for _ in weights]
    for token in order:
        lightest = [heapq.heappop(heap) for _ in range(top_k)]
        table[token] = [expert for _, _, expert in lightest]
        for load, carried, expert in lightest:
            heapq.heappush(heap, (load + weights[token], carried + 1, expert))
    return torch.tensor(table, dtype=torch.int64)
