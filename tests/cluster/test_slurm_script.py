"""The batch script: what it asks of sbatch, and what it does when bash runs it among stand-ins for SLURM's commands."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.slurm.script import environment_file, job_script
from moe_testbed.launcher.run.files import write_privately
from tests.cluster.awkward import VALUES
from tests.cluster.slurm_clusters import make_cluster

# srun starts rank 1 of 2 alone; scontrol and squeue tell of a job on two nodes; all note how they were called.
STAND_INS = {
    "srun": """#!/bin/bash
        echo "srun $*" >>"$CALLS"
        until [ "$1" = bash ]; do shift; done
        export SLURM_PROCID=1 SLURM_LOCALID=0 SLURM_NTASKS=2
        trap 'kill -USR1 -- -$!' USR1
        setsid "$@" &
        while kill -0 $! 2>/dev/null; do wait $!; status=$?; done
        exit $status
    """,
    "scontrol": """#!/bin/bash
        echo "scontrol $*" >>"$CALLS"
        [ "$1" = requeue ] || printf "node3\\nnode4\\n"
    """,
    "squeue": """#!/bin/bash
        echo "$STATE"
    """,
    "module": """#!/bin/bash
        echo "module $*" >>"$CALLS"
    """,
    "python3": f"""#!{sys.executable}
        import json, os, signal, sys
        told = {{name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}}
        with open(os.environ["CALLS"], "a") as calls:
            print("python3", *sys.argv[1:], json.dumps({{**told, "SAID": os.environ.get("SAID")}}), file=calls)
        run_dir, state, status = os.environ["RUN_DIR"], "finished", 0
        if os.path.exists(run_dir + "/waits"):
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            open(run_dir + "/ready", "w").close()
            signal.sigtimedwait([signal.SIGUSR1], 60)
            state, status = "stopped", 75
        with open(run_dir + "/status.json", "w") as file:
            json.dump({{"state": state}}, file)
        sys.exit(status)
    """,
}


def script_of(suite_dir: Path, cluster: ClusterConfig, runs: tuple[str, ...] = ("a-seed1", "b-seed1")) -> str:
    assert cluster.slurm is not None
    return job_script(suite_dir, runs, cluster, cluster.slurm)


def sbatch_options(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]


def test_sbatch_is_told_what_the_cluster_file_says() -> None:
    slurm: dict[str, object] = {"account": "lab", "cpus_per_gpu": 8, "jobs_at_once": 3, "options": ("--qos=high",)}
    options = sbatch_options(script_of(Path("/shared/runs/demo"), make_cluster(slurm)))
    assert options == [
        "--job-name=demo",
        "--array=0-1%3",
        "--partition=gpu",
        "--account=lab",
        "--time=24:00:00",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=8",
        "--signal=B:USR1@120",
        "--open-mode=append",
        "--output=/shared/runs/demo/slurm/%A_%a.txt",
        "--requeue",
        "--qos=high",
    ]


def test_what_the_cluster_file_leaves_open_is_left_to_slurm() -> None:
    options = sbatch_options(script_of(Path("/shared/50% full/demo"), make_cluster(accelerator="cpu")))
    assert not [option for option in options if option.startswith(("--account", "--gpus", "--cpus"))]
    assert "--output='/shared/50%% full/demo/slurm/%A_%a.txt'" in options


def test_trust_reaches_the_processes() -> None:
    cluster = make_cluster()
    assert cluster.slurm is not None
    trusted, plain = (job_script(Path("/shared/demo"), ["a"], cluster, cluster.slurm, trust) for trust in (True, False))
    train = [line for line in trusted.splitlines() if "launcher train" in line]
    assert train == [line + " --trust" for line in plain.splitlines() if "launcher train" in line]


def test_a_container_is_srun_s() -> None:
    slurm: dict[str, object] = {"container": "lab/image:1", "container_mounts": ("/a:/a", "/b c:/b")}
    script = script_of(Path("/shared/demo"), make_cluster(slurm))
    assert "--container-image=lab/image:1" in script
    assert "--container-mounts='/a:/a,/b c:/b'" in script


class Job:
    """A script that bash runs in a suite's folder whose name asks for quoting."""

    def __init__(self, folder: Path, cluster: ClusterConfig, state: str = "RUNNING", waits: bool = False) -> None:
        self.suite_dir = folder / "it's a suite"
        self.run_dir = self.suite_dir / "b-seed1"
        (self.run_dir / "logs").mkdir(parents=True)
        (self.suite_dir / "slurm").mkdir()
        if waits:
            (self.run_dir / "waits").touch()
        commands = folder / "bin"
        commands.mkdir()
        for name, text in STAND_INS.items():
            (commands / name).write_text(dedent(text.replace("#!", "        #!", 1)))
            (commands / name).chmod(0o755)
        script = self.suite_dir / "slurm" / "job.sh"
        script.write_text(script_of(self.suite_dir, cluster))
        (self.suite_dir / "slurm" / "environment.sh").write_text(environment_file(cluster))
        self.calls = folder / "calls"
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "STATE": state,
            "SLURM_ARRAY_JOB_ID": "40",
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_JOB_ID": "15042",
            "SLURM_RESTART_COUNT": "2",
            "SLURM_JOB_NODELIST": "node[3-4]",
        }
        with (self.suite_dir / "slurm" / "40_1.txt").open("w") as log:
            self.process = subprocess.Popen(["bash", str(script)], env=environment, stdout=log, stderr=log)

    def end(self) -> tuple[int, list[str]]:
        """Exit status, and the commands that were called."""
        status = self.process.wait(60)
        return status, self.calls.read_text().splitlines()

    def log(self) -> str:
        return (self.suite_dir / "slurm" / "40_1.txt").read_text()


@pytest.fixture
def setup(tmp_path: Path) -> dict[str, object]:
    """The part slurm of a cluster whose python3 is the stand-in."""
    return {"modules": ("cuda/12",), "setup": (f"export PATH={tmp_path / 'bin'}:$PATH",)}


def test_a_job_trains_its_run_with_slurms_ranks(tmp_path: Path, setup: dict[str, object]) -> None:
    job = Job(tmp_path, make_cluster(setup, environment={"SAID": 'it\'s "$HOME"'}))
    status, calls = job.end()
    assert status == 0, job.log()
    assert calls[:2] == ["scontrol show hostnames node[3-4]", "module load cuda/12"]
    assert f"--output={job.run_dir}/logs/rank-%t.txt" in calls[2] and "--kill-on-bad-exit=1" in calls[2]
    train = f"python3 -m moe_testbed.launcher train {job.run_dir}/config.yaml --run-dir {job.run_dir}"
    told, _, variables = calls[3].partition(" {")
    assert told == train
    assert json.loads("{" + variables) == {
        "RANK": "1",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "node3",
        "MASTER_PORT": "15056",
        "SAID": 'it\'s "$HOME"',
    }
    assert len(calls) == 4
    assert job.log() == "b-seed1: job 40_1, start 3, on node[3-4]\njob 40_1, start 3, rank 1 on \n"


def test_variables_stand_in_a_file_apart(tmp_path: Path) -> None:
    cluster = make_cluster(environment={"TOKEN": "secret"})
    assert "secret" not in script_of(tmp_path, cluster) and "TOKEN" not in script_of(tmp_path, cluster)
    assert environment_file(cluster) == "export TOKEN=secret\n"


def test_values_arrive_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "environment.sh"
    write_privately(file, environment_file(make_cluster(environment={**VALUES, "NAMED": "$RANK"})))
    told = "import json, os; print(json.dumps(dict(os.environ)))"
    run = f". {shlex.quote(str(file))}; exec {shlex.quote(sys.executable)} -c {shlex.quote(told)}"
    variables = json.loads(subprocess.run(["bash", "-ec", run], capture_output=True, check=True).stdout)
    assert {name: variables[name] for name in (*VALUES, "NAMED")} == {**VALUES, "NAMED": "$RANK"}


@pytest.mark.parametrize(
    ("slurm", "expected"),
    [
        ({}, sys.executable),
        ({"modules": ("cuda/12",), "setup": ("export OTHER=1",)}, sys.executable),
        ({"setup": ("export PATH=FOLDER/bin:$PATH",)}, "python3"),
        ({"container": "lab/image:1"}, "python3"),
    ],
    ids=["plain", "no other python", "a python of the setup", "the container's"],
)
def test_the_python_that_submits_trains_unless_another_is_put_first(
    tmp_path: Path, slurm: dict[str, object], expected: str
) -> None:
    if "setup" in slurm:
        slurm = slurm | {"setup": [str(line).replace("FOLDER", str(tmp_path)) for line in list(slurm["setup"])]}
    script = script_of(tmp_path, make_cluster(slurm))
    lines = script.partition("set -e\n")[2].partition("\n. ")[0]
    stand_in = tmp_path / "bin" / "python3"
    stand_in.parent.mkdir()
    stand_in.touch(0o755)
    run = f"module() {{ :; }}; set -e; {lines}; printenv python"
    assert subprocess.run(["bash", "-c", run], capture_output=True, text=True).stdout.strip() == expected


@pytest.mark.parametrize(("state", "comes_back"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_is_told_to_stop_comes_back_unless_it_is_cancelled(
    tmp_path: Path, setup: dict[str, object], state: str, comes_back: bool
) -> None:
    job = Job(tmp_path, make_cluster(setup), state, waits=True)
    deadline = time.monotonic() + 30
    while not (job.run_dir / "ready").exists():
        assert time.monotonic() < deadline and job.process.poll() is None, job.log()
    job.process.send_signal(signal.SIGUSR1)
    status, calls = job.end()
    assert status == 75, job.log()
    assert ("scontrol requeue 40_1" in calls) == comes_back


def test_a_setup_that_fails_trains_nothing(tmp_path: Path) -> None:
    job = Job(tmp_path, make_cluster({"setup": ("source /nowhere/activate",)}))
    status, calls = job.end()
    assert status != 0 and not [call for call in calls if call.startswith("srun")]
    assert "/nowhere/activate: No such file or directory" in job.log()
