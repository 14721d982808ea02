"""Trains in this process and writes down, every so many steps, what the process holds and has spent.

`python -m tests.campaign.sampled EXPERIMENT RUN_DIR SAMPLES`; no other module of the tests is imported, so that nothing
but the product is measured.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.train.train import train

EVERY = 50
YARDSTICK_EVERY = 5


class Yardstick:
    """A fixed piece of work of the kind that a step is, many small operations of torch and their gradients: whoever
    else is on the same cores slows it down as much as a step."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, dropout=0.0, batch_first=True)
            self._model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
            self._inputs_BLD = torch.randn(4, 16, 16)

    def measure(self) -> float:
        """Returns the CPU seconds that it takes now."""
        began = time.thread_time()
        self._model.zero_grad()
        self._model(self._inputs_BLD).square().mean().backward()
        return time.thread_time() - began


def main(experiment: str, run_dir: str, samples: str) -> None:
    """Trains an experiment to its end, with a line in the file of samples for every `EVERY` steps."""
    process, append, yardstick = psutil.Process(), RunFolder.append_metrics, Yardstick()
    in_yardsticks = 0.0

    def append_and_sample(folder: RunFolder, line: MetricsLine) -> None:
        nonlocal in_yardsticks
        append(folder, line)
        if line.kind != "train":
            return
        if line.step % YARDSTICK_EVERY == 0:
            in_yardsticks += yardstick.measure()
        if line.step % EVERY == 0:
            sample = {
                "step": line.step,
                # The steps run in this thread; the mirror to MLflow has one of its own.
                "step_seconds": time.thread_time() - in_yardsticks,
                "yardstick_seconds": in_yardsticks,
                "memory": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
            }
            with Path(samples).open("a", encoding="utf-8") as file:
                file.write(json.dumps(sample) + "\n")

    RunFolder.append_metrics = append_and_sample  # type: ignore[method-assign]
    train(load_experiment(experiment), Path(run_dir))


if __name__ == "__main__":
    main(*sys.argv[1:])
