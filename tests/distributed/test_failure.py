"""How ranks find out who of them is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from moe_testbed.launcher.errors import AskedToStop, CheckpointError, ConfigError
from moe_testbed.launcher.ranks.heartbeat import Alarm, CheckIn, host_name, symptom_of

CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [10.0.0.2]:54. See\nmore"


@pytest.mark.parametrize(
    ("error", "alarm"),
    [
        (RuntimeError(CLOSED), Alarm("transport", 3, "Connection closed by peer [10.0.0.2]:54")),
        (dist.DistBackendError("NCCL error in: x.cpp:1"), Alarm("transport", 3, "NCCL error in: x.cpp:1")),
        (RuntimeError("mat1 and mat2 do not fit"), Alarm("failed", 3, "RuntimeError: mat1 and mat2 do not fit")),
        (ValueError("no socket for it"), Alarm("failed", 3, "ValueError: no socket for it")),
        (CheckpointError("no room"), Alarm("mendable", 3, "CheckpointError: no room")),
        (AskedToStop("asked to stop by SIGTERM"), Alarm("stopped", 3, "asked to stop by SIGTERM")),
        (KeyboardInterrupt(), Alarm("failed", 3, "KeyboardInterrupt: ")),
    ],
)
def test_an_error_is_told_by_its_kind(error: BaseException, alarm: Alarm) -> None:
    assert Alarm.of(3, error) == alarm


def test_a_long_symptom_is_cut() -> None:
    assert len(symptom_of(RuntimeError("gloo " * 1000))) == 200


@pytest.fixture
def check_ins(tmp_path: Path) -> list[CheckIn]:
    """Of four ranks."""
    return [CheckIn(dist.FileStore(str(tmp_path / "store"), 4), rank, 4) for rank in range(4)]  # type: ignore[call-arg]


def test_the_first_alarm_counts(check_ins: list[CheckIn]) -> None:
    assert check_ins[2].heard() is None
    first = Alarm.of(1, ConfigError("the first"))
    check_ins[1].sound(first)
    check_ins[3].sound(Alarm.of(3, ConfigError("the second")))
    assert [one.heard() for one in check_ins] == [first] * 4


def test_who_does_not_check_in_is_missing(check_ins: list[CheckIn], monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 2):
        check_ins[rank].present()
    assert check_ins[0].missing() == [1, 3]
    check_ins[2].waited()
    assert check_ins[0].late() == [0, 1, 3]
    assert check_ins[2].names([1, 3]) == f"rank 1 on host {host_name()}, rank 3 on host {host_name()}"


def test_a_rank_that_was_lost_before_it_said_where_it_is_has_no_host(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)  # type: ignore[call-arg]
    assert CheckIn(store, 0, 2).names([0, 1]) == f"rank 0 on host {host_name()}, rank 1"


def test_each_rank_sees_how_often_the_next_one_has_given_a_sign_of_life(check_ins: list[CheckIn]) -> None:
    assert [check_ins[rank].beat() for rank in (0, 1, 1, 3)] == [0, 0, 0, 1]
    assert check_ins[0].beat() == 2


def test_a_false_alarm_is_forgotten(check_ins: list[CheckIn]) -> None:
    """Also where a rank has checked in, another has spoken and the next alarm comes before all have heard."""
    first, second = (Alarm("suspected", rank, "no sign of life") for rank in (1, 2))
    check_ins[1].sound(first)
    for one in check_ins:
        one.present()
    check_ins[0].wait_for_all(10_000.0)
    assert check_ins[0].speaks()
    check_ins[0].announce("")
    for one in check_ins[:3]:
        assert one.verdict(1.0) == ""
        one.begin_anew()
    check_ins[2].sound(second)
    assert [one.heard() for one in check_ins] == [second, second, second, first]
    assert check_ins[3].verdict(1.0) == ""
    check_ins[3].begin_anew()
    assert check_ins[3].heard() == second
    check_ins[3].present()
    assert check_ins[0].missing() == [0, 1, 2]
    check_ins[0].wait_for_all(0.0)
    assert check_ins[3].speaks()


def test_one_speaks_and_the_others_hear_it(check_ins: list[CheckIn]) -> None:
    assert [one.speaks() for one in check_ins] == [True, False, False, False]
    with pytest.raises(TimeoutError, match="no verdict was announced"):
        check_ins[1].verdict(0.0)
    check_ins[0].announce("rank 7 was lost")
    assert check_ins[1].verdict(1.0) == "rank 7 was lost"


def test_the_first_rank_waits_for_those_that_are_alive(check_ins: list[CheckIn]) -> None:
    for rank in (0, 1, 3):
        check_ins[rank].leave()
    # Returns long before its time.
    check_ins[0].wait_for_others([2], seconds=10_000.0)
    check_ins[0].wait_for_others([], seconds=0.0)
