import os

import pytest

from moe_testbed.data import machine


@pytest.mark.parametrize(
    ("quota", "cores"), [("", 8), ("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("3200000 100000", 8)]
)
def test_a_containers_quota_counts(quota: str, cores: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "control_group", lambda name: {"cpu.max": quota}[name])
    assert machine.usable_cores() == cores


def test_a_value_that_is_not_there_is_empty():
    assert machine.control_group("no/such/value") == ""
