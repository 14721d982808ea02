"""Submitting, looking, cancelling and failing, on real daemons, with a stub for the trainings."""

from __future__ import annotations

import json
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
from tests.slurm.slurm_cluster import NODES, SlurmCluster, wait_until

pytestmark = pytest.mark.daemons

MakeSuite = Callable[..., Suite]
MakeCluster = Callable[..., ClusterConfig]
Table = dict[str, dict[str, str]]

RUNS = Path("runs")
SUITE = RUNS / "stubs"


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Callable[[Suite], tuple[int, Table]]:
    """Status and content of what `slurm status` prints: name of a run -> column -> text."""

    def read(suite: Suite) -> tuple[int, Table]:
        capsys.readouterr()
        status = print_status(suite, RUNS)
        header, *lines = capsys.readouterr().out.splitlines()
        starts = [header.index(name) for name in header.split()]
        ends = [*starts[1:], None]
        cells = [[line[start:end].strip() for start, end in zip(starts, ends, strict=True)] for line in lines]
        return status, {row[0]: dict(zip(header.split(), row, strict=True)) for row in cells}

    return read


def until_queue_is_empty(seconds: float = 90) -> None:
    def over() -> bool:
        return all(job.is_over for job in read_jobs(SuiteFolder(SUITE)).values())

    wait_until(seconds, over, f"jobs did not end: {read_jobs(SuiteFolder(SUITE))}")


def until_step(run: str, step: int) -> None:
    path = SUITE / run
    wait_until(60, lambda: RunFolder(path).read_status().step >= step, f"{run} did not come to step {step}")


def events() -> list[str]:
    path = SUITE / "events.txt"
    return path.read_text().splitlines() if path.exists() else []


def test_a_suite_is_trained_by_an_array_with_a_limit(
    slurm: SlurmCluster,
    make_stub_suite: MakeSuite,
    make_cluster: MakeCluster,
    table: Callable[[Suite], tuple[int, Table]],
) -> None:
    suite = make_stub_suite("waits-a", "waits-b", "waits-c", "waits-d", "quick")
    cluster = make_cluster(slurm={"jobs_at_once": 2})
    assert table(suite)[1]["quick-seed1"]["state"] == "not started"
    assert submit(suite, RUNS, cluster, dry_run=False) == 0
    until_step("waits-a-seed1", 2)
    until_step("waits-b-seed1", 2)
    assert sorted(events()) == ["starts waits-a-seed1", "starts waits-b-seed1"]
    status, rows = table(suite)
    assert status == 0
    assert [row["state"] for row in rows.values()] == ["running", "running", "queued", "queued", "queued"]
    assert (rows["waits-a-seed1"]["step"], rows["quick-seed1"]["step"]) == ("2 of 4", "0 of 4")
    assert rows["waits-a-seed1"]["nodes"] in NODES
    assert rows["quick-seed1"]["reason"] == "waits: JobArrayTaskLimit"
    with pytest.raises(ConfigError, match=r"the suite stubs has 5 jobs in the queue \(\d+_0 RUNNING, .*slurm cancel"):
        submit(suite, RUNS, cluster, dry_run=False)
    (SUITE / "go").touch()
    until_queue_is_empty()
    status, rows = table(suite)
    assert status == 0
    assert {(row["state"], row["step"]) for row in rows.values()} == {("done", "4 of 4")}
    starts_and_ends = [event.split()[0] for event in events()]
    alive = [starts_and_ends[: i + 1].count("starts") - starts_and_ends[: i + 1].count("ends") for i in range(10)]
    assert max(alive) == 2
    assert submit(suite, RUNS, cluster, dry_run=False) == 0, "nothing is left to submit"
    assert len(events()) == 10


def test_ranks_come_from_slurm_and_write_logs_of_their_own(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(nodes=2, environment={"SAID": "it's $HOME"}, slurm={"jobs_at_once": 1})
    submit(make_stub_suite("quick"), RUNS, cluster, dry_run=False)
    until_queue_is_empty()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "SAID", "OMP_NUM_THREADS")
    told = [json.loads((SUITE / f"quick-seed1/logs/rank-{rank}.txt").read_text().splitlines()[-1]) for rank in range(4)]
    first = told[0]["MASTER_ADDR"]
    assert first == told[0]["host"], "the processes meet at the first rank's node"
    for rank in range(4):
        expected = [str(rank), str(rank % 2), "4", first, "it's $HOME", "1"]
        assert [told[rank][name] for name in names] == expected
    assert told[0]["host"] == told[1]["host"] != told[2]["host"] == told[3]["host"]
    assert len({ports["MASTER_PORT"] for ports in told}) == 1
    assert "it's $HOME" not in slurm.call("scontrol", "write", "batch_script", f"{read_array()}_0", "-")


def read_array() -> str:
    """Number of the job array."""
    (number,) = json.loads((SUITE / "slurm/jobs.json").read_text())["arrays"]
    return str(number)


def test_gpus_are_asked_for(slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster) -> None:
    submit(make_stub_suite("quick"), RUNS, make_cluster(accelerator="cuda"), dry_run=False)
    until_queue_is_empty()
    told = json.loads((SUITE / "quick-seed1/logs/rank-1.txt").read_text().splitlines()[-1])
    assert told["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_cancelled_jobs_write_a_checkpoint_and_do_not_come_back(
    slurm: SlurmCluster,
    make_stub_suite: MakeSuite,
    make_cluster: MakeCluster,
    table: Callable[[Suite], tuple[int, Table]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    suite, cluster = make_stub_suite("waits-a", "waits-b"), make_cluster(slurm={"jobs_at_once": 1})
    submit(suite, RUNS, cluster, dry_run=False)
    until_step("waits-a-seed1", 2)
    assert cancel(suite, RUNS) == 0
    assert "1 waiting jobs cancelled, 1 running ones told to write a checkpoint" in capsys.readouterr().out
    until_queue_is_empty()
    status, rows = table(suite)
    assert status == 0
    assert rows["waits-a-seed1"]["state"] == "stopped"
    assert rows["waits-a-seed1"]["reason"] == "asked to stop by SIGUSR1 after step 2"
    assert rows["waits-b-seed1"]["state"] == "not started"
    assert "ended as CANCELLED" in rows["waits-b-seed1"]["reason"]
    cancel(suite, RUNS)
    assert "no job of the suite stubs waits or runs" in capsys.readouterr().out
    (SUITE / "go").touch()
    submit(suite, RUNS, cluster, dry_run=False)
    until_queue_is_empty()
    assert {row["state"] for row in table(suite)[1].values()} == {"done"}
    assert events().count("starts waits-a-seed1") == 2


def test_a_job_that_slurm_cancels_does_not_come_back(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    submit(make_stub_suite("waits"), RUNS, make_cluster(), dry_run=False)
    until_step("waits-seed1", 2)
    slurm.call("scancel", read_jobs(SuiteFolder(SUITE))["waits-seed1"].number)
    until_queue_is_empty()
    assert RunFolder(SUITE / "waits-seed1").read_status().state == "stopped"
    assert read_jobs(SuiteFolder(SUITE))["waits-seed1"].state == "CANCELLED"
    assert events() == ["starts waits-seed1", "stops waits-seed1"]


def test_a_preempted_job_is_told_and_continues(
    slurm: SlurmCluster,
    make_stub_suite: MakeSuite,
    make_cluster: MakeCluster,
    table: Callable[[Suite], tuple[int, Table]],
) -> None:
    suite = make_stub_suite("quick", "waits")
    submit(suite, RUNS, make_cluster(), dry_run=False)
    until_step("waits-seed1", 2)
    wait_until(60, lambda: read_jobs(SuiteFolder(SUITE))["quick-seed1"].is_over, "the first job did not end")
    slurm.call("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3")
    wait_until(60, lambda: "stops waits-seed1" in events(), "the job was not told")
    wait_until(60, lambda: table(suite)[1]["waits-seed1"]["state"] == "queued", "the job was not queued again")
    assert "after: asked to stop by SIGUSR1 after step 2" in table(suite)[1]["waits-seed1"]["reason"]
    (SUITE / "go").touch()
    until_queue_is_empty()
    assert [event for event in events() if "waits" in event] == [
        "starts waits-seed1",
        "stops waits-seed1",
        "starts waits-seed1",
        "ends waits-seed1",
    ]
    (first_log,) = (SUITE / "slurm").glob("*_0.txt")
    assert first_log.read_text().count(", start ") == 1, "of the array, the last job alone was queued again"
    steps = [json.loads(line)["step"] for line in (SUITE / "waits-seed1/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_job_that_fails_the_same_way_twice_is_given_up(
    slurm: SlurmCluster,
    make_stub_suite: MakeSuite,
    make_cluster: MakeCluster,
    table: Callable[[Suite], tuple[int, Table]],
) -> None:
    suite = make_stub_suite("fails", "quick")
    submit(suite, RUNS, make_cluster(), dry_run=False)
    until_queue_is_empty()
    status, rows = table(suite)
    assert status == 1
    assert rows["quick-seed1"]["state"] == "done"
    assert (rows["fails-seed1"]["state"], rows["fails-seed1"]["reason"]) == ("failed", "RuntimeError: always the same")
    assert events().count("starts fails-seed1") == 2
    assert read_jobs(SuiteFolder(SUITE))["fails-seed1"].state == "FAILED"


def test_options_arrive_as_sbatch_reads_them_in_a_script(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cluster's file holds against the user's own defaults.
    monkeypatch.setenv("SBATCH_PARTITION", "urgent")
    options = ('--comment="a # b" # for the operators', "--export=NONE --mem=0", "-w node2")
    submit(make_stub_suite("quick"), RUNS, make_cluster(slurm={"options": options}), dry_run=False)
    until_queue_is_empty()
    job = read_jobs(SuiteFolder(SUITE))["quick-seed1"]
    told = slurm.call("scontrol", "show", "job", job.number)
    assert "Comment=a # b" in told and "Partition=main" in told and job.nodes == "node2"
    assert RunFolder(SUITE / "quick-seed1").read_status().state == "finished"


def test_wrong_input_of_one_rank_is_not_tried_again(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    submit(make_stub_suite("refuses"), RUNS, make_cluster(), dry_run=False)
    until_queue_is_empty()
    reason = RunFolder(SUITE / "refuses-seed1").read_status().reason
    assert reason.startswith("rank 1 on host node") and reason.endswith(": a value is wrong; mend it")
    assert events().count("starts refuses-seed1") == 1


@pytest.mark.slow
def test_a_job_that_is_stopped_twice_without_a_checkpoint_is_given_up(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    submit(make_stub_suite("stops"), RUNS, make_cluster(), dry_run=False)
    until_queue_is_empty()
    status = RunFolder(SUITE / "stops-seed1").read_status()
    assert (status.state, events()) == ("failed", ["starts stops-seed1"] * 2)
    assert str(status.reason).startswith("stopped twice without a new checkpoint since the start")


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_which_continues(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    submit(make_stub_suite("dies"), RUNS, make_cluster(), dry_run=False)
    until_queue_is_empty()
    assert RunFolder(SUITE / "dies-seed1").read_status().state == "finished"
    (reason,) = json.loads((SUITE / "dies-seed1/ends.json").read_text())["failures"]
    assert reason.startswith("rank 1 on host node") and reason.endswith("was killed by SIGKILL")
    assert events().count("starts dies-seed1") == 2


@pytest.mark.slow
def test_a_job_of_a_lost_node_continues_elsewhere(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    submit(make_stub_suite("waits"), RUNS, make_cluster(), dry_run=False)
    until_step("waits-seed1", 2)
    lost = read_jobs(SuiteFolder(SUITE))["waits-seed1"].nodes
    slurm.crash_node(lost)
    (SUITE / "go").touch()
    wait_until(90, lambda: events().count("starts waits-seed1") == 2, "the job was not queued again")
    until_queue_is_empty()
    assert read_jobs(SuiteFolder(SUITE))["waits-seed1"].nodes != lost
    assert RunFolder(SUITE / "waits-seed1").read_status().state == "finished"


@pytest.mark.slow
def test_a_job_whose_time_ends_is_told_and_continues(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster
) -> None:
    cluster = make_cluster(slurm={"time": "0:02:30", "grace_seconds": 60})
    submit(make_stub_suite("waits"), RUNS, cluster, dry_run=False)
    wait_until(200, lambda: "stops waits-seed1" in events(), "the job was not told")
    (SUITE / "go").touch()
    until_queue_is_empty()
    assert events() == ["starts waits-seed1", "stops waits-seed1", "starts waits-seed1", "ends waits-seed1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "nowhere"}, "slurm.partition is 'nowhere', which is none of this cluster's: main, urgent"),
        ({"options": ("--nodelist=node9",)}, "sbatch refuses: .*Invalid node name specified"),
    ],
)
def test_what_slurm_refuses_is_one_line(
    slurm: SlurmCluster, make_stub_suite: MakeSuite, make_cluster: MakeCluster, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        submit(make_stub_suite("quick"), RUNS, make_cluster(slurm=options), dry_run=False)
    assert "\n" not in str(raised.value)
