"""Measures what a training takes of its machine: processor, memory and GPU, under the names that MLflow itself uses."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import psutil
import torch

_MEGABYTE = 1e6


class SystemMetrics:
    """Measures at most once per interval, each time over the interval that has passed. Never raises.

    What cannot be read is left out: a GPU's utilization without NVML's Python package, everything of GPUs without one.
    """

    def __init__(self, interval_seconds: float = 10.0) -> None:
        self._interval = interval_seconds
        self._next = time.monotonic() + interval_seconds
        self._values()  # psutil counts the processor's time from the call before

    def due(self) -> dict[str, float] | None:
        """Returns the values now; None if the interval is not over yet.

        Returns:
            Percentages from 0 to 100 and megabytes (1,000,000 bytes). Processor and system memory are the whole
            machine's, process memory is this process's resident memory, a GPU's memory is what all processes use.
        """
        now = time.monotonic()
        if now < self._next:
            return None
        self._next = now + self._interval
        return self._values()

    @staticmethod
    def _values() -> dict[str, float]:
        values: dict[str, float] = {}
        for read in (_processor, _memory, _gpu_memory, _gpu_utilization):
            _add(values, read)
        return values


def _add(values: dict[str, float], read: Callable[[], dict[str, float]]) -> None:
    with contextlib.suppress(Exception):  # drivers raise errors of many kinds; none may end a training
        values |= read()


def _processor() -> dict[str, float]:
    return {"cpu_utilization_percentage": psutil.cpu_percent()}


def _memory() -> dict[str, float]:
    return {
        "system_memory_usage_megabytes": psutil.virtual_memory().used / _MEGABYTE,
        "process_memory_megabytes": psutil.Process().memory_info().rss / _MEGABYTE,
    }


def _gpu_memory() -> dict[str, float]:
    # Only of the GPU that this process is on: asking after another would take memory there.
    if not torch.cuda.is_initialized():
        return {}
    device = torch.cuda.current_device()
    free, total = torch.cuda.mem_get_info(device)
    return {f"gpu_{device}_memory_usage_megabytes": (total - free) / _MEGABYTE}


def _gpu_utilization() -> dict[str, float]:
    if not torch.cuda.is_initialized():
        return {}
    device = torch.cuda.current_device()
    return {f"gpu_{device}_utilization_percentage": float(torch.cuda.utilization(device))}
