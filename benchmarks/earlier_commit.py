"""How long does a training step of one process take now, and how long at an earlier commit?

    python benchmarks/earlier_commit.py COMMIT [EXPERIMENT] [OVERRIDE ...] [--rounds N]

Both versions train a few steps at the same moment, each in a process on a core of its own, and change cores after every
round; the ratio is the median over the rounds. One after the other, the machine's own changes drowned it. The first
steps, in which memory is taken for the first time, are left out. Times are the process's own. Linux, two cores.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("configs", "data", "launcher", "model", "routing")
_WARM = 10

# DeepSpeed's engine is what both versions have in common, however their modules are named.
_CHILD = """
import json, os, runpy, time
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.runtime.engine import DeepSpeedEngine
times, original = [], DeepSpeedEngine.step
def step(engine, *arguments, **options):
    last = engine.is_gradient_accumulation_boundary()
    original(engine, *arguments, **options)
    if last:
        times.append(time.process_time())
DeepSpeedEngine.step = step
try:
    runpy.run_module("moe_testbed.launcher", run_name="__main__")
finally:
    print(json.dumps(times))
"""


def lay_out(files: Path, path: Path) -> Path:
    """Makes the files of a checkout an import package below ``path``, which PYTHONPATH must name."""
    (path / "moe_testbed").mkdir(parents=True)
    for package in PACKAGES:
        (path / "moe_testbed" / package).symlink_to(files / package)
    return path


def unpack(commit: str, folder: Path) -> Path:
    """Writes the files of a commit into ``folder``, which it returns."""
    archive = subprocess.run(["git", "archive", commit], cwd=_ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder)
    return folder


def seconds_per_step(path: Path, core: int, experiment: str, overrides: list[str]) -> float:
    """Returns the median over the steps of one short training on one core by the version at ``path``."""
    short = ["training.steps=60", "training.warmup_steps=1", "evaluation.every=0", "evaluation.sequences_per_domain=1"]
    # The names that earlier commits know; this one reads them too.
    short += ["statistics.points=0", "examination.sequences_per_domain=0", "tracking.mlflow=false", "runtime.threads=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(path)}
    with tempfile.TemporaryDirectory() as run_dir:
        command = [sys.executable, "-c", _CHILD, "train", experiment, "--run-dir", run_dir]
        done = subprocess.run(
            [*command, *short, "runtime.device=cpu", *overrides],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    times = json.loads(done.stdout.splitlines()[-1])[_WARM:]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commit")
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        now = lay_out(_ROOT, Path(folder) / "now")
        then = lay_out(unpack(arguments.commit, Path(folder) / "files"), Path(folder) / "then")
        ratios = []
        for number in range(arguments.rounds):
            cores = [number % 2, 1 - number % 2]
            with ThreadPoolExecutor() as pool:
                seconds_now, seconds_then = pool.map(
                    lambda path, core: seconds_per_step(path, core, arguments.experiment, arguments.overrides),
                    [now, then],
                    cores,
                )
            ratios.append(seconds_now / seconds_then)
            print(f"round {number + 1}: {seconds_now:.4f} s now, {seconds_then:.4f} s then", flush=True)
    print(f"step time now: {statistics.median(ratios):.3f} x that of {arguments.commit}")


if __name__ == "__main__":
    main()
