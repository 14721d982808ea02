"""How long does a command take from its start to its first sign of life?

    python benchmarks/startup.py [--rounds 3]

`moe-testbed --help`, against Python doing nothing in the same round; and `moe-testbed train` on the tiny experiment up
to the first line of metrics.jsonl, with the data's store in the cache (it is built first, and not counted).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_COMMAND = [sys.executable, "-m", "moe_testbed.launcher"]
_EXPERIMENT = "configs/experiments/tiny.yaml"


def seconds_of(command: list[str]) -> float:
    """Returns the duration of a command."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def seconds_to_first_step() -> float:
    """Returns the duration from the start of a training to its first optimizer step's line."""
    short = [
        "training.steps=2",
        "training.warmup_steps=1",
        "evaluation.sequences_per_domain=1",
        "tracking.mlflow=false",
    ]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        started = time.perf_counter()
        command = [*_COMMAND, "train", _EXPERIMENT, *short, "--run-dir", folder]
        training = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while not metrics.exists() and training.poll() is None:
            time.sleep(0.02)
        seconds = time.perf_counter() - started
        if training.wait() != 0:
            sys.exit("the training failed: run the same command by hand to see why")
    return seconds


def main() -> None:
    """Prints medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    subprocess.run([*_COMMAND, "data", "build", "configs/mixes/packages8.yaml"], check=True, stdout=subprocess.DEVNULL)
    pairs = [(seconds_of([*_COMMAND, "--help"]), seconds_of([sys.executable, "-c", ""])) for _ in range(rounds)]
    ratio = statistics.median(own / python for own, python in pairs)
    told = f"{statistics.median(own for own, _ in pairs):.2f} s, {ratio:.1f} x Python doing nothing"
    first_step = f"{statistics.median(seconds_to_first_step() for _ in range(rounds)):.1f} s"
    print(f"--help: {told}")
    print(f"train, start to first step: {first_step}")
    print(json.dumps({"figures": {"help": told, "first_step": first_step}}))


if __name__ == "__main__":
    main()
