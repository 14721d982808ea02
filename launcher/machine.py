"""How many trainings a machine carries at a time."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

BYTES_PER_JOB = 1_500_000_000
"""What a training of the demo's size takes at most, with torch and DeepSpeed loaded."""


def jobs_at_once(cores: int, free_bytes: int, runs: int) -> int:
    """One training per core, as far as the free memory gives each `BYTES_PER_JOB`; at least one, at most ``runs``."""
    return max(1, min(cores, free_bytes // BYTES_PER_JOB, runs))


def usable_cores() -> int:
    """Cores that this process may use, a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _cgroup("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def free_memory_bytes() -> int:
    """Memory that can still be used without swapping, a container's limit counted."""
    free = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return max(0, min(free, int(limit) - int(used))) if limit.isdigit() and used.isdigit() else free


def _cgroup(name: str) -> str:
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""
