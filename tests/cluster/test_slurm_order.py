"""Runs that start from others under SLURM: what is asked of it, and what is told of them, where there is none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data import build
from moe_testbed.launcher.cluster.slurm import ending
from moe_testbed.launcher.cluster.slurm.jobs import read_jobs
from moe_testbed.launcher.cluster.slurm.status import print_status
from moe_testbed.launcher.cluster.slurm.submit import submit
from moe_testbed.launcher.config.suite import Suite, load_suite, suite_runs
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status
from moe_testbed.launcher.run.suite_folder import SubmittedJobs, SuiteFolder
from tests.cluster.slurm_clusters import make_cluster

Write = Callable[[str, str], Path]

RUNS = Path("runs")
# Two seeds of: mlm and its child, that one's child; scratch.
SUITE = """
    name: stages
    experiment: small.yaml
    overrides: {model.architecture: encoder, objective: masked}
    seeds: [1, 2]
    runs:
      last: {overrides: {start.encoder.run: child}}
      mlm: {}
      child: {overrides: {start.encoder.run: mlm}}
      scratch: {}
"""
ORDERED = [
    f"{label}-seed{seed}"
    for labels in (("mlm", "scratch"), ("child",), ("last",))
    for seed in (1, 2)
    for label in labels
]


@pytest.fixture
def suite(experiment: Path, write: Write, monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: None)
    return load_suite(write("stages.yaml", SUITE))


@pytest.fixture
def calls(write: Write, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts stand-ins for SLURM's commands first on the PATH, and returns how they were called. Arrays are numbered from
    7 on; scontrol refuses if there is a file `refuses`."""
    said = '#!/bin/sh\necho "$(basename "$0") $*" >>calls.txt\n'
    for name, text in {
        "sinfo": "echo gpu",
        "sbatch": "echo $((6 + $(grep -c ^sbatch calls.txt)))",
        "scontrol": 'if [ -e refuses ]; then echo "scontrol: error: no such thing" >&2; exit 1; fi',
        "scancel": "",
        "squeue": "cat jobs.txt 2>/dev/null || true",
    }.items():
        write(f"bin/{name}", f"{said}{text}\n").chmod(0o755)
    monkeypatch.setenv("PATH", str(Path("bin").resolve()), prepend=":")
    return lambda: Path("calls.txt").read_text().splitlines()


def asked(calls: list[str]) -> list[str]:
    """What was submitted and updated, of the many options of sbatch those that put the arrays in order."""
    found = []
    for call in calls:
        words = call.split()
        if words[0] == "sbatch":
            words = [word for word in words if word.startswith(("sbatch", "--array", "--dependency", "--kill"))]
        if words[0] in ("sbatch", "scontrol", "scancel"):
            found.append(" ".join(words))
    return found


def test_each_generation_is_an_array_whose_jobs_wait_for_their_own_parents(
    suite: Suite, calls: Callable[[], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    submit(suite, RUNS, make_cluster(), dry_run=False)
    assert asked(calls()) == [
        "sbatch --array=0-3%4",
        "sbatch --array=4-5%4 --dependency=afterany:7 --kill-on-invalid-dep=yes",
        "scontrol update JobId=8_4 Dependency=afterok:7_0",
        "scontrol update JobId=8_5 Dependency=afterok:7_2",
        "sbatch --array=6-7%4 --dependency=afterany:8 --kill-on-invalid-dep=yes",
        "scontrol update JobId=9_6 Dependency=afterok:8_4",
        "scontrol update JobId=9_7 Dependency=afterok:8_5",
    ]
    assert "8 runs submitted as job arrays 7, 8, 9, at most 4 of each at a time" in capsys.readouterr().out
    script = Path("runs/stages/slurm/job.sh").read_text()
    assert script.partition("runs=(\n")[2].partition("\n)")[0].split() == ORDERED
    assert "#SBATCH --array=0-3%4\n" in script
    assert SuiteFolder(RUNS / "stages").read_jobs() == SubmittedJobs(
        {"7": ORDERED[:4], "8": ORDERED[4:6], "9": ORDERED[6:]}
    )


def test_runs_that_start_from_one_run_are_told_so_at_once(
    experiment: Path, write: Write, calls: Callable[[], list[str]], suite: Suite
) -> None:
    children = "\n".join(f"      {name}: {{overrides: {{start.encoder.run: mlm}}}}" for name in "bc")
    write("wide.yaml", SUITE.replace("stages", "wide").replace("seeds: [1, 2]", "").rstrip() + f"\n{children}\n")
    submit(load_suite("wide.yaml"), RUNS, make_cluster(), dry_run=False)
    assert "scontrol update JobId=8_2,8_3,8_4 Dependency=afterok:7_0" in asked(calls())


def test_children_of_finished_runs_need_not_wait(suite: Suite, calls: Callable[[], list[str]]) -> None:
    for run in suite_runs(suite, RUNS):
        if run.label in ("mlm", "scratch"):
            RunFolder(run.run_dir).prepare(run.config)
            RunFolder(run.run_dir).write_status(Status("finished", 4, 4))
    submit(suite, RUNS, make_cluster(), dry_run=False)
    assert asked(calls())[:2] == ["sbatch --array=0-1%4", asked(calls())[1]]
    assert asked(calls())[1].startswith("sbatch --array=2-3%4 --dependency=afterany:7")


def test_what_slurm_refuses_in_between_leaves_no_job(suite: Suite, calls: Callable[[], list[str]]) -> None:
    Path("refuses").touch()
    with pytest.raises(ConfigError, match="scontrol refuses: no such thing"):
        submit(suite, RUNS, make_cluster(), dry_run=False)
    assert asked(calls())[-2:] == ["scancel 8", "scancel 7"]


def test_a_dry_run_prints_all_arrays(suite: Suite, capsys: pytest.CaptureFixture[str]) -> None:
    submit(suite, RUNS, make_cluster(), dry_run=True)
    script, _, rest = capsys.readouterr().out.partition("\nexit $status\n")
    assert "#SBATCH --array=0-3%4" in script
    assert rest.splitlines() == [
        "",
        "# Submitted as ${array1}. Runs that start from others are further arrays of the same script:",
        "# array2=$(sbatch --parsable --array=4-5%4 --dependency=afterany:${array1} --kill-on-invalid-dep=yes job.sh)",
        "# scontrol update JobId=${array2}_4 Dependency=afterok:${array1}_0",
        "# scontrol update JobId=${array2}_5 Dependency=afterok:${array1}_2",
        "# array3=$(sbatch --parsable --array=6-7%4 --dependency=afterany:${array2} --kill-on-invalid-dep=yes job.sh)",
        "# scontrol update JobId=${array3}_6 Dependency=afterok:${array2}_4",
        "# scontrol update JobId=${array3}_7 Dependency=afterok:${array2}_5",
    ]
    assert not RUNS.exists()


def test_jobs_of_all_arrays_are_read_also_where_slurm_forgets_their_indices(
    suite: Suite, calls: Callable[[], list[str]], write: Write
) -> None:
    folder = SuiteFolder(RUNS / "stages")
    write("runs/stages/slurm/jobs.json", json.dumps({"array": "7", "runs": ORDERED[:4]}))
    write("jobs.txt", "7_0|RUNNING|node1|None\n7_3|PENDING||Priority\n")
    assert {run: job.number for run, job in read_jobs(folder).items()} == {"mlm-seed1": "7_0", "scratch-seed2": "7_3"}
    folder.write_jobs(SubmittedJobs({"7": ORDERED[:4], "8": ORDERED[4:6], "9": ORDERED[6:]}))
    write("jobs.txt", "9_7|PENDING||Dependency\n8|CANCELLED||None\n7_2|RUNNING|node1|None\n")
    found = {run: (job.number, job.state) for run, job in read_jobs(folder).items()}
    assert found == {
        "mlm-seed2": ("7_2", "RUNNING"),
        "child-seed1": ("8_4", "CANCELLED"),
        "child-seed2": ("8_5", "CANCELLED"),
        "last-seed2": ("9_7", "PENDING"),
    }
    assert "--jobs=7,8,9" in calls()[-1]


def test_status_tells_what_a_run_waits_for(
    suite: Suite, calls: Callable[[], list[str]], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    SuiteFolder(RUNS / "stages").path.joinpath("slurm").mkdir(parents=True)
    SuiteFolder(RUNS / "stages").write_jobs(SubmittedJobs({"7": ORDERED[:4], "8": ORDERED[4:6], "9": ORDERED[6:]}))
    write("jobs.txt", "8_4|PENDING||Dependency\n8_5|CANCELLED||DependencyNeverSatisfied\n7_2|NODE_FAIL|node1|None\n")
    print_status(suite, RUNS)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "queued" in rows["child-seed1"] and rows["child-seed1"].endswith("waits for mlm-seed1")
    assert "not started" in rows["child-seed2"]
    assert rows["child-seed2"].endswith("the run it starts from, mlm-seed2, has not come to its end")


def test_a_parent_that_is_given_up_fails_what_starts_from_it(suite: Suite) -> None:
    folders = {run.name: RunFolder(run.run_dir) for run in suite_runs(suite, RUNS)}
    for run in suite_runs(suite, RUNS):
        folders[run.name].prepare(run.config)
        folders[run.name].prepare_jobs()
    parent = folders["mlm-seed1"]
    parent.job_start_file.touch()
    parent.write_status(Status("failed", 2, 4, "RuntimeError: always the same"))
    start = "job 7_0, start 1"
    assert ending.decide(parent.path, 1, False, start, "") == 75, "it is started again"
    assert not folders["child-seed1"].has_begun
    assert ending.decide(parent.path, 1, False, start, "") == 1
    reason = "the run it starts from, mlm-seed1, failed: RuntimeError: always the same"
    assert folders["child-seed1"].read_status() == Status("failed", 0, 4, reason)
    assert folders["last-seed1"].read_status().reason == f"the run it starts from, child-seed1, failed: {reason}"
    assert not any(folders[name].has_begun for name in folders if name.endswith("2") or name == "scratch-seed1")


def test_a_finished_run_that_is_found_to_be_stale_has_failed(suite: Suite) -> None:
    (run,) = (run for run in suite_runs(suite, RUNS) if run.name == "child-seed1")
    folder = RunFolder(run.run_dir)
    folder.prepare(run.config)
    folder.prepare_jobs()
    folder.write_status(Status("finished", 4, 4))
    start = "job 8_4, start 1"
    folder.job_start_file.touch()
    os.utime(folder.status_file, (1, 1))
    (folder.rank_logs / "rank-0.txt").write_text(f"{start}, rank 0 on node1\nmoe-testbed: it is stale\n")
    said = f"{start}, on node1\nsrun: error: node1: task 0: Exited with exit code 2\n"
    assert ending.decide(folder.path, 2, False, start, said) == 2
    assert folder.read_status() == Status("failed", 0, 4, "rank 0 on host node1: it is stale")
