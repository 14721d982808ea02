"""A rank that is lost: the others end in time, with a message that names it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_testbed.launcher.config.experiment import ParallelConfig
from moe_testbed.launcher.ranks.heartbeat import CheckIn
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.watchdog import Watchdog
from tests.distributed import misfortunes
from tests.distributed.real_ranks import RealRanks, until
from tests.distributed.sleepers import Sleepers

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

TIMEOUT = 3.0
BOUND = TIMEOUT + 10.0
SLOW = pytest.mark.slow


@pytest.fixture
def experiment(make_experiment: MakeExperiment) -> Callable[[int], dict[str, Any]]:
    """For so many ranks: they share the experts two by two, and wait for one another but for a short time."""

    def make(steps: int) -> dict[str, Any]:
        return make_experiment(
            training=make_experiment()["training"] | {"steps": steps, "micro_batch_size": 2},
            parallel={
                "expert_parallel_size": 2,
                "expert_parallel_across_nodes": True,
                "timeout_seconds": TIMEOUT,
            },
            evaluation={"every": 0, "sequences_per_domain": 1},
            checkpoint={"every": 2},
        )

    return make


@pytest.mark.parametrize(
    ("misfortune", "cause"),
    [
        ("is killed", "rank 1 on host HERE was lost in step 4 ("),
        ("fails", "rank 1 on host HERE was lost in step 4 (RuntimeError: the reason)"),
        pytest.param("freezes", "rank 1 on host HERE was lost in step 4 (no sign of life for 2 s)", marks=SLOW),
        pytest.param("hangs", "rank 1 on host HERE kept the others waiting for too long in step 4 (", marks=SLOW),
    ],
)
def test_the_other_rank_ends_in_time_and_says_why(
    misfortune: str,
    cause: str,
    experiment: Callable[[int], dict[str, Any]],
    run_on_ranks: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(AssertionError, match="exit codes of the ranks"):
        run_on_ranks(misfortunes.train_and_tell, 2, experiment(6), str(run_dir), 1, 4, misfortune)
    told = json.loads((run_dir / "rank_0.json").read_text())
    cause = cause.replace("HERE", told["host"])
    assert told["error"] == "LostRankError"
    assert told["message"].startswith(cause)
    assert told["seconds"] < BOUND
    assert json.loads((run_dir / "status.json").read_text()) == {
        "state": "failed",
        "step": 3,
        "steps": 6,
        "reason": told["message"],
    }
    assert capsys.readouterr().err.count(f"moe-testbed: {told['message']}") == 1
    assert (run_dir / "checkpoints" / "step_00000002" / "complete.json").exists()


def test_every_group_is_bounded(run_on_ranks: Run) -> None:
    waited, _ = run_on_ranks(misfortunes.wait_in_vain, 2)
    assert len(waited) == 2
    assert all("1000ms" in error for error in waited)


def test_a_single_process_is_not_watched() -> None:
    notes: list[tuple[str, str]] = []
    watchdog = Watchdog(
        Ranks(0, 1, torch.device("cpu"), None), ParallelConfig(), 2, lambda state, reason: notes.append((state, reason))
    )
    watchdog.passed(1)
    with watchdog.slow():
        pass
    assert watchdog.all_alive()
    watchdog.close()
    error = RuntimeError("Connection closed by peer")
    assert watchdog.explain(error) is error
    assert notes == [("failed", "RuntimeError: Connection closed by peer")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "lost", "number"),
    [(2, 0, signal.SIGKILL), (2, 0, signal.SIGSTOP), (4, 3, signal.SIGKILL), (4, 1, signal.SIGSTOP)],
)
def test_ranks_that_a_scheduler_starts_end_in_time(
    size: int, lost: int, number: signal.Signals, experiment: Callable[[int], dict[str, Any]], tmp_path: Path
) -> None:
    """Rank 0 takes the store by which the ranks meet along."""
    content = experiment(100_000)
    with RealRanks(content, size, tmp_path, tmp_path / "run", interpreters=True) as ranks:
        ranks.wait_for_step(3)
        ranks.processes[lost].send_signal(number)
        assert ranks.exit_codes(60.0, lost=(lost,)) == [1] * (size - 1)
        reason = ranks.status()["reason"]
        assert f"rank {lost} on host node{lost} was lost in step " in reason
        assert ranks.status()["state"] == "failed"
        errors = ranks.errors()
        assert f"moe-testbed: {reason}" in errors
        if lost > 0:
            assert errors.count("was lost in step") == 1
        assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("lost", "number", "step", "when"),
    [
        (2, signal.SIGKILL, 1, "in step 2 (no sign of life for 2 s)"),
        (0, signal.SIGKILL, 0, "while the ranks started (it keeps the store by which ranks meet"),
        pytest.param(1, signal.SIGSTOP, 2, "after the last step (no sign of life for 2 s)", marks=SLOW),
        pytest.param(0, signal.SIGSTOP, 1, "in step 2 (it keeps the store by which ranks meet", marks=SLOW),
    ],
)
def test_a_lost_rank_is_found_though_no_collective_fails(
    lost: int, number: signal.Signals, step: int, when: str, tmp_path: Path
) -> None:
    with Sleepers(3, tmp_path, TIMEOUT, step) as sleepers:
        sleepers.processes[lost].send_signal(number)
        others = [rank for rank in range(3) if rank != lost]
        assert sleepers.exit_codes(others, BOUND) == [1, 1]
        lines = [line for rank in others for line in sleepers.told(rank) if line.startswith("moe-testbed: ")]
        assert lines[0].startswith(f"moe-testbed: rank {lost} on host node{lost} was lost {when}")
        # Without the store each tells it.
        assert len(lines) == (1 if lost else 2)


def test_a_rank_that_is_silent_for_too_long_but_alive_is_not_accused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)  # type: ignore[call-arg]
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "barrier", lambda: None)
    beat, begin_anew, false_alarms = CheckIn.beat, CheckIn.begin_anew, []
    monkeypatch.setattr(CheckIn, "beat", lambda self: 0 if self._rank else beat(self))
    monkeypatch.setattr(CheckIn, "begin_anew", lambda self: (false_alarms.append(self), begin_anew(self)))
    # It would end the tests.
    monkeypatch.setattr(Watchdog, "_leave_the_main_thread_behind", lambda self: None)
    notes: list[tuple[str, str]] = []
    watchdogs: list[Watchdog] = []
    for rank in range(2):
        ranks = Ranks(rank, 2, torch.device("cpu"), object())  # type: ignore[arg-type]
        watchdogs.append(Watchdog(ranks, ParallelConfig(timeout_seconds=1.0), 9, lambda *note: notes.append(note)))
    until(lambda: len(false_alarms) >= 4, 60.0, "nobody was suspected")
    assert all(watchdog.all_alive() for watchdog in watchdogs)
    for watchdog in watchdogs:
        watchdog.close()
    assert not notes
