"""Pseudo-random numbers and permutations as pure functions of integers: alike on every platform and numpy version."""

import numpy as np
import numpy.typing as npt

UInt64 = npt.NDArray[np.uint64]

ROUNDS = 6


def mix_bits(x: UInt64) -> UInt64:
    """SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit integers, modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: int | npt.ArrayLike) -> UInt64:
    """Returns a 64-bit key of non-negative integers, elementwise over arrays; the order of the parts matters."""
    key: UInt64 = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _with_part(key, np.asarray(part).astype(np.uint64))
    return key


def _with_part(key: UInt64, part: UInt64) -> UInt64:
    """Returns the key of the parts of ``key`` and one more."""
    return mix_bits((key ^ part) + np.uint64(0x9E3779B97F4A7C15))


def shuffled(size: int, key: UInt64) -> npt.NDArray[np.int64]:
    """Returns a permutation of range(size) chosen by one key, O(size log size)."""
    # mix_bits is a bijection, so that no two of the sorted numbers are equal.
    return np.argsort(mix_bits(key ^ np.arange(size, dtype=np.uint64)), kind="stable").astype(np.int64)


def permute(index: npt.NDArray[np.int64], size: npt.NDArray[np.int64], key: UInt64) -> npt.NDArray[np.int64]:
    """Returns where `index` goes in the permutation of range(size) that `key` chooses; O(1), elementwise.

    A Feistel network permutes the smallest range of 4**h numbers that holds range(size); whatever it sends outside is
    sent through again until it falls inside, which keeps it a permutation ("cycle walking": Black and Rogaway, CT-RSA
    2002).
    """
    half_bits = np.ones_like(size)
    while np.any(grow := (np.int64(1) << (2 * half_bits)) < size):
        half_bits = half_bits + grow
    half_bits_unsigned = half_bits.astype(np.uint64)
    size_unsigned, keys = size.astype(np.uint64), np.stack([key_of(key, number) for number in range(ROUNDS)])
    position = index.astype(np.uint64)
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        position[outside] = _feistel(position[outside], half_bits_unsigned[outside], keys[:, outside])
        outside = position >= size_unsigned
    return position.astype(np.int64)


def _feistel(x: UInt64, half_bits: UInt64, keys: UInt64) -> UInt64:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = x >> half_bits, x & mask
    for key in keys:
        left, right = right, left ^ (_with_part(key, right) & mask)
    return (left << half_bits) | right
