"""Real launches: the same file under torchrun, deepspeed and `launch` trains as the ranks of the other tests do."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config
from moe_testbed.launcher.errors import ASKED_TO_STOP
from moe_testbed.launcher.run.files import read_json, read_json_lines
from tests.train import driver

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
TRAIN = ["moe_testbed.launcher", "train", "experiment.yaml"]
LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port={port}",
        "-m",
        *TRAIN,
    ],
    "deepspeed": [DEEPSPEED, "--num_accelerators=2", "--master_port={port}", "--module", *TRAIN],
    "launch": [
        *(sys.executable, "-m", "moe_testbed.launcher", "launch", "experiment.yaml"),
        *("--cluster", "configs/clusters/laptop.yaml", "--set", "master_port={port}"),
    ],
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def losses(run_dir: Path) -> list[float]:
    lines = read_json_lines(run_dir / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


def write_experiment(content: dict[str, Any], folder: Path) -> None:
    config = ExperimentConfig.model_validate(content)
    (folder / "experiment.yaml").write_text(dump_config(config), encoding="utf-8")


def command(launcher: str) -> list[str]:
    return [part.format(port=free_port()) for part in LAUNCHERS[launcher]] + ["--run-dir", "launched"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_launched_training_equals_that_of_two_ranks(
    launcher: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    content = make_experiment(parallel={"expert_parallel_size": 2}, training=make_experiment()["training"])
    content["training"]["micro_batch_size"] = 4
    run_on_ranks(driver.train, 2, content, str(tmp_path / "ranks"))
    write_experiment(content, tmp_path)
    done = subprocess.run(
        command(launcher), env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "launched") == losses(tmp_path / "ranks")


@pytest.mark.slow
def test_a_launch_that_is_asked_to_stop_continues_bit_for_bit(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    content = make_experiment(
        parallel={"expert_parallel_size": 2}, training=make_experiment()["training"] | {"steps": 400}
    )
    content["training"]["micro_batch_size"] = 4
    run_on_ranks(driver.train, 2, content, str(tmp_path / "ranks"))
    write_experiment(content, tmp_path)
    run_dir = tmp_path / "launched"
    with subprocess.Popen(command("launch"), env=os.environ | ENVIRONMENT, cwd=tmp_path) as process:
        deadline = time.monotonic() + 300
        while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == ASKED_TO_STOP
    assert read_json(run_dir / "status.json")["state"] == "stopped"
    assert len(losses(run_dir)) < 400
    done = subprocess.run(command("launch"), env=os.environ | ENVIRONMENT, timeout=300, cwd=tmp_path)
    assert done.returncode == 0
    assert losses(run_dir) == losses(tmp_path / "ranks")
