"""What the machine gives this process."""

import os
from pathlib import Path


def usable_cores() -> int:
    """Cores that this process may use, a container's quota counted."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = control_group("cpu.max").partition(" ")
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def control_group(name: str) -> str:
    """Returns a value of the container's control group, such as `memory.max`; empty where there is none."""
    try:
        return (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return ""
