"""What submitting a suite prints and refuses where there is no SLURM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data import build
from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.slurm.script import job_script
from moe_testbed.launcher.cluster.slurm.submit import submit
from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.errors import ConfigError
from tests.cluster.slurm_clusters import make_cluster

Write = Callable[[str, str], Path]


@pytest.fixture
def suite(experiment: Path, write: Write) -> Suite:
    write("two.yaml", "name: two\nexperiment: small.yaml\nruns: {a: {}, b: {}}\n")
    return load_suite("two.yaml")


def test_a_dry_run_prints_the_script_and_writes_nothing(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    cluster = make_cluster()
    assert cluster.slurm is not None
    assert submit(suite, Path("runs"), cluster, dry_run=True) == 0
    assert capsys.readouterr().out == job_script(
        Path.cwd() / "runs" / "two", ["a-seed1", "b-seed1"], cluster, cluster.slurm
    )
    assert sorted(Path.cwd().rglob("*")) == before


def test_runs_without_checkpoints_are_warned_of(
    experiment: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    write("mixed.yaml", "name: mixed\nexperiment: small.yaml\nruns: {a: {overrides: {checkpoint.every: 2}}, b: {}}\n")
    submit(load_suite("mixed.yaml", ["checkpoint.every=3"]), Path("runs"), make_cluster(), dry_run=True)
    assert not capsys.readouterr().err
    submit(load_suite("mixed.yaml"), Path("runs"), make_cluster(), dry_run=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("moe-testbed: checkpoint.every is 0 in 1 of 2 runs") and "set checkpoint.every" in line


def test_only_its_owner_can_read_the_variables(suite: Suite, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: None)
    for name, says in {"sbatch": "7", "sinfo": "gpu"}.items():
        write(f"bin/{name}", f"#!/bin/sh\necho {says}\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").resolve()), prepend=":")
    folder = Path("runs/two/slurm")
    folder.mkdir(parents=True)
    (folder / "environment.sh").touch(0o644)
    submit(suite, Path("runs"), make_cluster(environment={"TOKEN": "secret"}), dry_run=False)
    assert (folder / "environment.sh").read_text() == "export TOKEN=secret\n"
    assert (folder / "environment.sh").stat().st_mode & 0o777 == 0o600
    assert "secret" not in (folder / "job.sh").read_text()


def test_finished_runs_are_not_submitted(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("a", "b"):
        folder = Path("runs/two") / f"{label}-seed1"
        folder.mkdir(parents=True)
        (folder / "status.json").write_text('{"state": "finished"}')
        submit(suite, Path("runs"), make_cluster(), dry_run=True)
    first, _, last = capsys.readouterr().out.rpartition("exit $status\n")
    assert "\n    b-seed1\n" in first and "a-seed1" not in first
    assert last.startswith("all 2 runs are finished")


def test_without_slurm_nothing_is_written(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch is not on the PATH: SLURM is not installed here; use a login node"):
        submit(suite, Path("runs"), make_cluster(), dry_run=False)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("cluster", "message"),
    [
        (make_cluster(launcher="deepspeed", hostfile="hosts"), "the cluster test has launcher deepspeed; set launcher"),
        (make_cluster({"time": "0:03:00", "grace_seconds": 120}), "slurm.time is 0:03:00 and slurm.grace_seconds 120"),
        (make_cluster(nodes=3), "run 'a' on the cluster test: "),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(
    suite: Suite, cluster: ClusterConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        submit(suite, Path("runs"), cluster, dry_run=False)
    assert "\n" not in str(raised.value) and not Path("runs").exists()


@pytest.mark.parametrize(("time", "fits"), [("1-00:00:00", True), ("00:03:30", True), ("0:03:29", False)])
def test_the_time_must_be_longer_than_the_grace(suite: Suite, time: str, fits: bool) -> None:
    cluster = make_cluster({"time": time, "grace_seconds": 120})
    if fits:
        assert submit(suite, Path("runs"), cluster, dry_run=True) == 0
    else:
        with pytest.raises(ConfigError, match="at least 90 s longer than the grace"):
            submit(suite, Path("runs"), cluster, dry_run=True)
