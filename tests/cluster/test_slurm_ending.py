"""What becomes of a job whose processes have ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.slurm.ending import decide
from moe_testbed.launcher.progress import read_status


@pytest.fixture
def run_dir(experiment: Path) -> Path:
    """A run that has come to step 3 of 4 in a job that started just now."""
    folder = experiment.parent / "runs" / "a-seed1"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(experiment.read_text())
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 1.0}\n')
    (folder / "logs" / "rank-1.txt").write_text("10%|#\rmoe-testbed: the data are gone\n\n")
    (folder / "logs" / "started").touch()
    return folder


def write_status(run_dir: Path, state: str, reason: str | None = None, seconds_before: int = 0) -> None:
    path = run_dir / "status.json"
    path.write_text(json.dumps({"state": state, "step": 3, "steps": 4, "reason": reason}))
    started = (run_dir / "logs" / "started").stat().st_mtime_ns
    os.utime(path, ns=(started, started - seconds_before * 10**9))


EXITED = "srun: error: node2: task 1: Exited with exit code {}\nsrun: error: node1: tasks 0,2-3: Terminated\n"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (EXITED.format(1), "rank 1 on host node2: the data are gone"),
        (EXITED.format(137), "rank 1 on host node2 was killed by SIGKILL"),
        ("srun: error: node1: tasks 2-3: Out Of Memory\n", "rank 2 on host node1: Out Of Memory"),
        ("srun: error: Unable to create step\n", "ended with status 1 without being finished"),
    ],
)
def test_the_first_rank_that_ended_is_the_reason(run_dir: Path, log: str, reason: str) -> None:
    write_status(run_dir, "failed", "RuntimeError: of the start before", seconds_before=60)
    assert decide(run_dir, 1, False, log) == 75
    assert read_status(run_dir) == {"state": "failed", "step": 3, "steps": 4, "reason": reason}
    assert decide(run_dir, 1, False, log) == 1, "the same again"


def test_what_the_training_says_itself_is_the_reason(run_dir: Path) -> None:
    write_status(run_dir, "failed", "RuntimeError: diverged")
    assert decide(run_dir, 137, False, EXITED.format(1)) == 75
    assert read_status(run_dir)["reason"] == "RuntimeError: diverged"


def test_a_job_that_fails_ever_differently_is_given_up_the_third_time(run_dir: Path) -> None:
    ends = []
    for number in range(3):
        write_status(run_dir, "failed", f"LostRankError: in step {number}")
        ends.append(decide(run_dir, 1, False, ""))
    assert ends == [75, 75, 1]


@pytest.mark.parametrize("told", [False, True])
def test_wrong_input_is_never_tried_again(run_dir: Path, told: bool) -> None:
    assert decide(run_dir, 143, told, EXITED.format(2)) == 2
    assert read_status(run_dir)["reason"] == "rank 1 on host node2: the data are gone"


@pytest.mark.parametrize(
    ("state", "told", "expected"), [("finished", False, 0), ("finished", True, 0), ("stopped", True, 75)]
)
def test_an_end_without_failure_is_no_failure(run_dir: Path, state: str, told: bool, expected: int) -> None:
    write_status(run_dir, state)
    assert decide(run_dir, 0, told, "") == expected
    assert not (run_dir / "failures.json").exists()


def test_a_job_that_had_no_time_for_a_checkpoint_comes_back(run_dir: Path) -> None:
    write_status(run_dir, "running")
    assert decide(run_dir, 138, True, EXITED.format(138)) == 75
    assert not (run_dir / "failures.json").exists()
