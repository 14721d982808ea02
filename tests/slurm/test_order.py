"""Jobs of runs that start from others, on real daemons, with a stub for the trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.slurm.cancel import cancel
from moe_testbed.launcher.cluster.slurm.jobs import read_jobs
from moe_testbed.launcher.cluster.slurm.status import print_status
from moe_testbed.launcher.cluster.slurm.submit import submit
from moe_testbed.launcher.config.suite import Suite
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from tests.slurm.slurm_cluster import SlurmCluster, wait_until

pytestmark = pytest.mark.daemons

MakeSuite = Callable[..., Suite]
MakeCluster = Callable[..., ClusterConfig]

RUNS = Path("runs")
SUITE = RUNS / "stubs"


def events() -> list[str]:
    path = SUITE / "events.txt"
    return path.read_text().splitlines() if path.exists() else []


def until_queue_is_empty() -> None:
    def over() -> bool:
        return all(job.is_over for job in read_jobs(SuiteFolder(SUITE)).values())

    wait_until(150, over, f"jobs did not end: {read_jobs(SuiteFolder(SUITE))}")


def told(suite: Suite, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    """Status of `slurm status`, and the line of each run in what it prints, each gap as one blank."""
    capsys.readouterr()
    status = print_status(suite, RUNS)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:]]
    return status, {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}


@pytest.mark.slow
def test_jobs_wait_for_their_parents_through_requeues_and_end_with_those_that_fail(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    # `dies` is queued again once and then finishes; `fails` is queued again once and then given up.
    starts = {"quick_child": "dies", "quick_last": "quick-child", "quick_orphan": "fails", "quick_lost": "quick-orphan"}
    suite = make_stub_suite("dies", "fails", "quick", **starts)
    assert submit(suite, RUNS, make_cluster(), dry_run=False) == 0
    assert "7 runs submitted as job arrays " in capsys.readouterr().out
    until_queue_is_empty()
    assert events().count("starts dies-seed1") == 2 and events().count("starts fails-seed1") == 2
    chain = [event for event in events() if "dies" in event or "child" in event or "last" in event]
    assert chain[-5:] == [
        "ends dies-seed1",
        "starts quick-child-seed1",
        "ends quick-child-seed1",
        "starts quick-last-seed1",
        "ends quick-last-seed1",
    ]
    assert not [event for event in events() if "orphan" in event or "lost" in event]
    reason = "the run it starts from, fails-seed1, failed: RuntimeError: always the same"
    status, rows = told(suite, capsys)
    assert status == 1
    assert rows["quick-last-seed1"].startswith("done 4 of 4")
    assert rows["quick-orphan-seed1"].startswith("failed 0 of 4") and rows["quick-orphan-seed1"].endswith(reason)
    assert rows["quick-lost-seed1"].endswith(f"the run it starts from, quick-orphan-seed1, failed: {reason}")
    assert RunFolder(SUITE / "quick-orphan-seed1").read_status().reason == reason
    jobs = read_jobs(SuiteFolder(SUITE))
    assert {jobs[f"quick-{name}-seed1"].state for name in ("orphan", "lost")} == {"CANCELLED"}


def test_waiting_children_say_for_what_and_are_cancelled_with_their_parents(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    suite, cluster = make_stub_suite("waits", quick_child="waits", quick_last="quick-child"), make_cluster()
    submit(suite, RUNS, cluster, dry_run=False)
    parent = RunFolder(SUITE / "waits-seed1")
    wait_until(60, lambda: parent.read_status().step >= 2, "the parent did not come to step 2")
    status, rows = told(suite, capsys)
    assert status == 0
    assert rows["waits-seed1"].startswith("running")
    assert rows["quick-child-seed1"].startswith("queued") and rows["quick-child-seed1"].endswith(
        "waits for waits-seed1"
    )
    assert rows["quick-last-seed1"].endswith("waits for quick-child-seed1")
    with pytest.raises(ConfigError, match="the suite stubs has 3 jobs in the queue"):
        submit(suite, RUNS, cluster, dry_run=False)
    assert cancel(suite, RUNS) == 0
    assert "2 waiting jobs cancelled, 1 running ones told to write a checkpoint" in capsys.readouterr().out
    until_queue_is_empty()
    assert told(suite, capsys)[1]["waits-seed1"].startswith("stopped")
    assert events() == ["starts waits-seed1", "stops waits-seed1"]
    (SUITE / "go").touch()
    submit(suite, RUNS, cluster, dry_run=False)
    until_queue_is_empty()
    assert {line.partition(" ")[0] for line in told(suite, capsys)[1].values()} == {"done"}
    assert events()[-1] == "ends quick-last-seed1"
