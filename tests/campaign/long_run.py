"""A long training: what the process holds, and what a step costs, is the same at its end as at its beginning."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.campaign.world import environment, write_world

ROOT = Path(__file__).parents[2]
MOST_GROWTH = 1.02
"""The last tenth of the training may cost and hold so many times what the first does."""

Samples = list[dict[str, Any]]


def train_long(folder: Path, steps: int) -> list[str]:
    """Trains the smallest model for so many steps, with checkpoints and an MLflow store, and prints what it took.

    Returns:
        What has grown, a line each.
    """
    experiment = write_world(
        folder,
        training={"steps": steps},
        evaluation={"every": 500},
        probe={"points": 32},
        checkpoint={"every": 100, "keep": 2},
        tracking={"mlflow": True},
    )
    samples_file = folder / "samples.jsonl"
    with (folder / "log.txt").open("wb") as log:
        command = ["-m", "tests.campaign.sampled", str(experiment), str(folder / "run"), str(samples_file)]
        # The paths in the mix are relative to the folder.
        python_path = environment(folder, PYTHONPATH=str(ROOT))
        status = subprocess.call([sys.executable, *command], cwd=folder, env=python_path, stdout=log, stderr=log)
    if status != 0:
        return [f"the training ended with status {status}, see {folder / 'log.txt'}"]
    return growth([json.loads(line) for line in samples_file.read_text(encoding="utf-8").splitlines()])


def growth(samples: Samples) -> list[str]:
    """Compares the last tenth of the samples with the first, of which the first fifth is the start and left out."""
    tenth = len(samples) // 10
    first, last = samples[tenth // 5 : tenth], samples[-tenth:]
    grown = []
    pairs = {name: (_usual(first, name), _usual(last, name)) for name in ("memory", "files", "threads")}
    pairs["CPU time of a step, in yardsticks"] = (_cost_of_a_step(first), _cost_of_a_step(last))
    for name, (before, after) in pairs.items():
        line = f"{name}: {before:.6g} in the first tenth, {after:.6g} in the last ({after / before:.3f})"
        print(line)
        if after > MOST_GROWTH * before:
            grown.append(line)
    return grown


def _usual(samples: Samples, name: str) -> float:
    """The median: MLflow's thread opens files for a moment."""
    return float(statistics.median(sample[name] for sample in samples))


def _cost_of_a_step(samples: Samples) -> float:
    """The median over the samples: what an evaluation or a checkpoint adds to some of them is not of a step. The unit
    is what a fixed piece of work took between the same steps, since others may use the machine."""

    def spent(name: str) -> list[float]:
        return [after[name] - before[name] for before, after in pairwise(samples)]

    steps, yardsticks = spent("step_seconds"), spent("yardstick_seconds")
    return statistics.median(step / yardstick for step, yardstick in zip(steps, yardsticks, strict=True))
