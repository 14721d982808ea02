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

from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.train.train import train

EVERY = 50


def yardstick() -> float:
    """Returns the CPU seconds of a fixed piece of work, which others on the same cores slow down as they do a step."""
    matrix = torch.ones(64, 64)
    began = time.thread_time()
    for _ in range(300):
        matrix = torch.softmax(matrix @ matrix, dim=-1)
    return time.thread_time() - began


def main(experiment: str, run_dir: str, samples: str) -> None:
    """Trains an experiment to its end, with a line in the file of samples for every `EVERY` steps."""
    process, append = psutil.Process(), RunFolder.append_metrics
    measured = [0.0]

    def append_and_sample(folder: RunFolder, line: MetricsLine) -> None:
        append(folder, line)
        if line.kind == "train" and line.step % EVERY == 0:
            seconds = yardstick()
            measured[0] += seconds
            sample = {
                "step": line.step,
                # The steps run in this thread; the mirror to MLflow has one of its own.
                "step_seconds": time.thread_time() - measured[0],
                "yardstick_seconds": seconds,
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
