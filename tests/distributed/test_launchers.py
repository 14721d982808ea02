"""Real launches: the same file under torchrun and deepspeed trains as the ranks of the other tests do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.config import ExperimentConfig, dump_config
from tests.training import driver

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port={port}", "-m"],
    "deepspeed": [DEEPSPEED, "--num_accelerators=2", "--master_port={port}", "--module"],
}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def losses(run_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", sorted(LAUNCHERS))
def test_a_launched_training_equals_that_of_two_ranks(
    launcher: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    content = make_experiment(parallel={"expert_parallel_size": 2}, training=make_experiment()["training"])
    content["training"]["micro_batch_size"] = 4
    run_on_ranks(driver.train, 2, content, str(tmp_path / "ranks"))
    config = tmp_path / "experiment.yaml"
    config.write_text(dump_config(ExperimentConfig.model_validate(content)), encoding="utf-8")
    command = [part.format(port=free_port()) for part in LAUNCHERS[launcher]]
    command += ["moe_testbed.launcher", "train", str(config), "--run-dir", str(tmp_path / "launched")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "launched") == losses(tmp_path / "ranks")
