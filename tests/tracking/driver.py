"""What the ranks of a training do: track it, die on the way, or have a store that never answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.run.files import read_json
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.tracking import mirror
from moe_testbed.launcher.train import train as training


def train(config: dict[str, Any], run_dir: str, uri: str) -> None:
    """Trains with the store at a URI."""
    # The process is forked from one that was there before the test.
    os.environ["MLFLOW_TRACKING_URI"] = uri
    training.train(ExperimentConfig.model_validate(config), Path(run_dir))


def train_and_die(config: dict[str, Any], run_dir: str, uri: str, step: int) -> None:
    """Trains, and kills its process once a step is written and the store has the steps before it."""
    training.Mirror = partial(mirror.Mirror, interval=0.05)  # type: ignore[misc, assignment]
    append = RunFolder.append_metrics

    def append_and_die(folder: RunFolder, line: MetricsLine) -> None:
        append(folder, line)
        if line.step == step:
            while read_json(folder.path / "mlflow.json").get("steps", {}).get("train", 0) < step:
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.append_metrics = append_and_die  # type: ignore[method-assign]
    train(config, run_dir, uri)


def train_without_an_answer(config: dict[str, Any], run_dir: str, uri: str) -> None:
    """Trains beside a mirror that is stuck for ever from its first call on."""
    training.Mirror = partial(mirror.Mirror, interval=0.0)  # type: ignore[misc, assignment]
    mirror.Mirror._send = lambda *_: threading.Event().wait()  # type: ignore[method-assign, assignment]
    mirror.FINISH_SECONDS = 0.1
    train(config, run_dir, uri)
