"""What becomes of a job whose processes have ended."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from moe_testbed.launcher.checkpoint.checkpoints import newest_whole
from moe_testbed.launcher.checkpoint.regroup import RankLayout
from moe_testbed.launcher.cluster.slurm import ending
from moe_testbed.launcher.run.checkpoint_mark import CheckpointMark, write_mark
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status

START = "job 7_1, start 2"


def decide(run_dir: Path, status: int, told: bool, said: str) -> int:
    """As the batch script asks; what srun said in the start before must not count."""
    before = f"a-seed1: job 7_1, start 1, on node4\n{EXITED.format(2)}srun: error: long ago\n"
    return ending.decide(run_dir, status, told, START, f"{before}a-seed1: {START}, on node[1-2]\n{said}")


@pytest.fixture
def run_dir(experiment: Path) -> Path:
    """A run that has come to step 3 of 4 in a job that started just now."""
    folder = experiment.parent / "runs" / "a-seed1"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(experiment.read_text())
    (folder / "metrics.jsonl").write_text('{"kind": "train", "step": 3, "loss": 1.0}\n')
    before = "job 7_1, start 1, rank 1 on node4\nof the start before\n"
    now = f"{START}, rank 1 on node2\n10%|#\rmoe-testbed: the data are gone\n\n"
    (folder / "logs" / "rank-1.txt").write_text(before + now)
    (folder / "logs" / "rank-2.txt").write_text(before)
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
        (
            "srun: error: node1: task 2: Exited with exit code 1\n",
            "rank 2 on host node1: ended with status 1 without a message",
        ),
        (
            "srun: error: node1: task 3: Exited with exit code 1\n",
            "rank 3 on host node1: ended with status 1 without a message",
        ),
        ("srun: error: Unable to create step\n", "srun: Unable to create step"),
        ("", "ended with status 1 without being finished"),
    ],
)
def test_the_first_rank_that_ended_is_the_reason(run_dir: Path, log: str, reason: str) -> None:
    write_status(run_dir, "failed", "RuntimeError: of the start before", seconds_before=60)
    assert decide(run_dir, 1, False, log) == 75
    assert RunFolder(run_dir).read_status() == Status("failed", 3, 4, reason)
    assert decide(run_dir, 1, False, log) == 1, "the same again"


def test_what_the_training_says_itself_is_the_reason(run_dir: Path) -> None:
    write_status(run_dir, "failed", "RuntimeError: diverged")
    assert decide(run_dir, 137, False, EXITED.format(1)) == 75
    assert RunFolder(run_dir).read_status().reason == "RuntimeError: diverged"


def test_a_job_that_fails_ever_differently_is_given_up_the_third_time(run_dir: Path) -> None:
    ends = []
    for number in range(3):
        write_status(run_dir, "failed", f"LostRankError: in step {number}")
        ends.append(decide(run_dir, 1, False, ""))
    assert ends == [75, 75, 1]


@pytest.mark.parametrize("told", [False, True])
@pytest.mark.parametrize("rank", [1, 3], ids=["with a log", "without one"])
def test_wrong_input_is_never_tried_again(run_dir: Path, told: bool, rank: int) -> None:
    # srun has asked the others to stop.
    write_status(run_dir, "stopped", "asked to stop by SIGTERM outside the steps")
    assert decide(run_dir, 143, told, f"srun: error: node2: task {rank}: Exited with exit code 2\n") == 2
    assert RunFolder(run_dir).read_status().state == "failed"
    assert str(RunFolder(run_dir).read_status().reason).startswith(f"rank {rank} on host node2: ")


def test_a_killed_rank_is_a_failure_though_the_others_were_asked_to_stop(run_dir: Path) -> None:
    for expected in (75, 137):
        write_status(run_dir, "stopped", "asked to stop by SIGTERM outside the steps")
        assert decide(run_dir, 137, False, "srun: error: node2: task 1: Killed\n") == expected
        assert RunFolder(run_dir).read_status().reason == "rank 1 on host node2: Killed"


def test_a_run_that_is_finished_is_no_failure(run_dir: Path) -> None:
    write_status(run_dir, "finished", seconds_before=60)
    assert decide(run_dir, 1, False, EXITED.format(1)) == 0
    assert not (run_dir / "ends.json").exists()


def write_checkpoint(run_dir: Path, step: int) -> None:
    checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
    checkpoint.mkdir(parents=True)
    write_mark(checkpoint, CheckpointMark(step, asdict(RankLayout(1, 1))))
    (checkpoint.parent / f"step_{step + 1:08d}").mkdir()
    assert newest_whole(checkpoint.parent) == checkpoint


@pytest.mark.parametrize(
    ("told", "state", "said"),
    [(True, "stopped", ""), (False, "stopped", ""), (True, "running", EXITED.format(138))],
    ids=["told", "told by others", "without time for a checkpoint"],
)
def test_a_stopped_job_comes_back_while_there_are_new_checkpoints(
    run_dir: Path, told: bool, state: str, said: str
) -> None:
    write_status(run_dir, state, "asked to stop by SIGUSR1" if state == "stopped" else None)
    ends = []
    for step in (None, 2, None, 8, None, None):
        if step:
            write_checkpoint(run_dir, step)
        ends.append(decide(run_dir, 0, told, said))
    assert ends == [75, 75, 75, 75, 75, 1]
    last = "asked to stop by SIGUSR1" if state == "stopped" else "it had no time"
    assert RunFolder(run_dir).read_status().state == "failed"
    assert str(RunFolder(run_dir).read_status().reason).startswith(
        f"stopped twice without a new checkpoint since step 8 ({last}); raise slurm.time"
    )


def test_a_job_whose_start_takes_longer_than_its_time_is_given_up(run_dir: Path) -> None:
    write_status(run_dir, "stopped", "asked to stop by SIGUSR1 outside the steps")
    assert [decide(run_dir, 0, True, "") for _ in range(2)] == [75, 1]
    assert "without a new checkpoint since the start (" in str(RunFolder(run_dir).read_status().reason)


def test_a_folder_that_is_gone_is_one_line(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run_dir)
    arguments = ["--status", "1", "--told", "no", "--start", START, "--log", str(run_dir / "gone.txt")]
    monkeypatch.setattr("sys.argv", ["ending", str(run_dir), *arguments])
    assert ending.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
