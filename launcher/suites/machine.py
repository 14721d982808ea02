"""Tells how many trainings a machine carries at a time."""

from __future__ import annotations

import psutil

from moe_testbed.data.machine import control_group

BYTES_PER_JOB = 1_500_000_000
"""What a training of the demo's size takes at most, with torch and DeepSpeed loaded."""


def jobs_at_once(cores: int, free_bytes: int, runs: int) -> int:
    """Returns one training per core, as far as the free memory gives each `BYTES_PER_JOB`; at least one, at most
    ``runs``."""
    return max(1, min(cores, free_bytes // BYTES_PER_JOB, runs))


def free_memory_bytes() -> int:
    """Returns the memory that can still be used without swapping, within a container's limit."""
    free = int(psutil.virtual_memory().available)
    limit, used = control_group("memory.max"), control_group("memory.current")
    return max(0, min(free, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free
