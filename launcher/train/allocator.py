"""Keeps the C library from giving memory back between steps."""

from __future__ import annotations

import ctypes
import platform

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def keep_freed_memory() -> None:
    """Makes glibc reuse the large blocks that it would return to the kernel after every use.

    Each step allocates and frees the same activations; with glibc's defaults every one of them is mapped and cleared
    anew, which costs a fifth of a small model's step on a CPU (`benchmarks/training_step.py`). Elsewhere than on glibc
    nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 30)
    libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
