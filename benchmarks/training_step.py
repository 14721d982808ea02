"""How long does a training step take with and without the memory that the C library is told to keep?

    python benchmarks/training_step.py [EXPERIMENT] [OVERRIDE ...]

Each variant trains a few steps in a process of its own, in turn, round after round; the ratio is the median over the
rounds. The first steps, in which memory is taken for the first time, are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

_STEPS, _WARM = 24, 8

_CHILD = """
import sys
from pathlib import Path
from moe_testbed.launcher.train import allocator
if sys.argv[1] == "default":
    allocator.keep_freed_memory = lambda: None  # before the modules that import it
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.train.train import train
train(load_experiment(sys.argv[3], sys.argv[4:]), Path(sys.argv[2]))
"""


def seconds_per_step(variant: str, experiment: str, overrides: list[str]) -> float:
    """Returns the median over the steps of one short training."""
    short = [
        f"training.steps={_STEPS}",
        "training.warmup_steps=1",
        "evaluation.every=0",
        "evaluation.sequences_per_domain=1",
        "tracking.mlflow=false",
        "runtime.threads=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-c", _CHILD, variant, folder, experiment, *short, *overrides],
            check=True,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if line["kind"] == "train"][_WARM:]
    return 1.0 / statistics.median(rates)


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    ratios = []
    for _ in range(arguments.rounds):
        kept, default = (
            seconds_per_step(variant, arguments.experiment, arguments.overrides) for variant in ("kept", "default")
        )
        ratios.append(kept / default)
    said = f"{statistics.median(ratios):.2f} x the C library's default"
    print(f"step time with freed memory kept: {said}")
    print(json.dumps({"figures": {"training_step": said}}))


if __name__ == "__main__":
    main()
