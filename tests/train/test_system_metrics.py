"""What a training takes of its machine, read against the operating system's own files and a made-up GPU."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

import psutil
import pytest
import torch

from moe_testbed.launcher.ranks.system_metrics import SystemMetrics


def broken(*_: object) -> NoReturn:
    raise OSError("the driver is gone")


def test_nothing_until_the_interval_is_over_and_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    system = SystemMetrics(interval_seconds=10.0)
    assert system.due() is None
    now = 109.9
    assert system.due() is None
    now = 110.0
    assert system.due()
    assert system.due() is None
    now = 120.0
    assert system.due()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_memory_is_what_the_kernel_says() -> None:
    values = SystemMetrics(interval_seconds=0.0).due()
    assert values is not None
    match = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    # Both grow a little between the two readings.
    assert values["process_memory_megabytes"] == pytest.approx(int(match[1]) * 1024 / 1e6, rel=0.05)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e6
    assert 0 < values["system_memory_usage_megabytes"] < total
    assert 0 <= values["cpu_utilization_percentage"] <= 100


def test_a_gpu_gives_memory_and_utilization_of_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", {2: (60_000_000, 80_000_000)}.__getitem__)
    monkeypatch.setattr(torch.cuda, "utilization", {2: 75}.__getitem__)
    values = SystemMetrics(interval_seconds=0.0).due()
    assert values is not None
    assert {key: value for key, value in values.items() if "gpu" in key} == {
        "gpu_2_memory_usage_megabytes": 20.0,
        "gpu_2_utilization_percentage": 75.0,
    }


def test_what_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_percent", broken)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", broken)
    values = SystemMetrics(interval_seconds=0.0).due()
    assert values is not None
    assert set(values) == {"system_memory_usage_megabytes", "process_memory_megabytes"}
