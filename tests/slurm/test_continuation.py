"""Real trainings as jobs: what SLURM interrupts ends as what it leaves alone, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.slurm.jobs import read_jobs
from moe_testbed.launcher.cluster.slurm.submit import submit
from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config
from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from tests.distributed import corpus
from tests.slurm.slurm_cluster import SlurmCluster, wait_until
from tests.train.results import assert_same_run

pytestmark = [pytest.mark.daemons, pytest.mark.slow]

MakeCluster = Callable[..., ClusterConfig]

STEPS = 120
INTERRUPTED, UNDISTURBED = Path("interrupted"), Path("undisturbed")
NAME = "top_k-seed1"
EXCLUSIVE = {"options": ("--exclusive",)}


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """One run, long enough to be interrupted; its balancer keeps state between steps."""
    monkeypatch.chdir(tmp_path)
    content = corpus.make_experiment(corpus.write_corpus(tmp_path / "corpus"))
    content["training"] |= {"steps": STEPS, "micro_batch_size": 2}
    content |= {"evaluation": {"every": 0, "sequences_per_domain": 5}, "checkpoint": {"every": 20}}
    (tmp_path / "experiment.yaml").write_text(dump_config(ExperimentConfig.model_validate(content)), encoding="utf-8")
    (tmp_path / "suite.yaml").write_text("name: real\nexperiment: experiment.yaml\nruns: {top_k: {}}\n")
    return load_suite("suite.yaml")


def come_to(runs_dir: Path, step: int) -> None:
    run_dir = runs_dir / "real" / NAME
    wait_until(150, lambda: RunFolder(run_dir).read_status().step >= step, f"{run_dir} did not come to step {step}")


def end_well(runs_dir: Path) -> None:
    folder = runs_dir / "real"
    wait_until(
        150, lambda: all(job.is_over for job in read_jobs(SuiteFolder(folder)).values()), f"{folder} did not end"
    )
    status = RunFolder(folder / NAME).read_status()
    logs = "".join(path.read_text() for path in [*folder.glob("slurm/*.txt"), *folder.glob("*/logs/rank-*.txt")])
    assert status.state == "finished", logs[-6000:]


def submit_both(suite: Suite, cluster: ClusterConfig) -> None:
    for runs_dir in (INTERRUPTED, UNDISTURBED):
        submit(suite, runs_dir, cluster, dry_run=False)


def assert_both_end_alike() -> None:
    end_well(INTERRUPTED)
    end_well(UNDISTURBED)
    assert (starts(INTERRUPTED), starts(UNDISTURBED)) == (2, 1)
    assert_same_run(INTERRUPTED / "real" / NAME, UNDISTURBED / "real" / NAME)


def nodes_of(runs_dir: Path) -> str:
    (job,) = read_jobs(SuiteFolder(runs_dir / "real")).values()
    return job.nodes


def starts(runs_dir: Path) -> int:
    (log,) = (runs_dir / "real" / "slurm").glob("*_0.txt")
    return log.read_text().count(", start ")


@pytest.mark.parametrize(("nodes", "processes"), [(1, 1), (2, 2)], ids=["one process", "two nodes of two processes"])
def test_a_preempted_training_continues_bit_for_bit(
    slurm: SlurmCluster, suite: Suite, make_cluster: MakeCluster, nodes: int, processes: int
) -> None:
    submit_both(suite, make_cluster(stub=False, nodes=nodes, gpus_per_node=processes, slurm=EXCLUSIVE))
    come_to(INTERRUPTED, 3)
    urgent = (
        "--partition=urgent",
        f"--nodelist={nodes_of(INTERRUPTED)}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 1",
    )
    slurm.call("sbatch", *urgent)
    assert_both_end_alike()


def test_a_training_on_a_lost_node_continues_elsewhere_bit_for_bit(
    slurm: SlurmCluster, suite: Suite, make_cluster: MakeCluster
) -> None:
    submit_both(suite, make_cluster(stub=False, gpus_per_node=1, slurm=EXCLUSIVE))
    come_to(INTERRUPTED, 25)
    lost = nodes_of(INTERRUPTED)
    slurm.crash_node(lost)
    assert_both_end_alike()
    assert nodes_of(INTERRUPTED) != lost
