"""How many trainings at a time."""

from __future__ import annotations

import pytest

from moe_testbed.launcher.suites.machine import free_memory_bytes, jobs_at_once

GB = 10**9


@pytest.mark.parametrize(
    ("cores", "free", "runs", "jobs"),
    [(2, 16 * GB, 8, 2), (16, 6 * GB, 8, 4), (16, 64 * GB, 8, 8), (4, GB, 8, 1), (1, 0, 1, 1)],
)
def test_jobs_at_once(cores: int, free: int, runs: int, jobs: int) -> None:
    assert jobs_at_once(cores, free, runs) == jobs


def test_the_machine_has_something() -> None:
    assert free_memory_bytes() > 0
