"""How long does a suite of short trainings take now, and how long at an earlier commit?

    python benchmarks/suite_time.py [COMMIT] [--runs 12] [--steps 200] [--rounds 1] [--cache-dir data_cache]

Both versions train the same suite of `study.yaml` from start to report, in turn and on the same two cores, with MLflow
in a SQLite store of their own; the data's store is built before and not counted. Wall time tells what a user waits for
and needs a machine without other work. Processor time, of the command and all that it starts, is told beside it.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from earlier_commit import lay_out, unpack

_ROOT = Path(__file__).resolve().parents[1]
_LAUNCHER = [sys.executable, "-m", "moe_testbed.launcher"]
_CORES = set(sorted(os.sched_getaffinity(0))[:2])
_SCOPES = ("token", "sequence", "document", "micro_batch", "global_batch", "window")


@dataclass(frozen=True)
class Cost:
    """Seconds of the clock and of processors that a suite took, and the losses that its trainings came to."""

    wall: float
    processor: float
    losses: dict[str, float]


def suite_of(experiment: Path, runs: int) -> dict[str, object]:
    """Returns a suite of so many runs of an experiment, which differ in the scope and strength of balancing."""
    overrides = {
        f"run{number:02}": {
            "overrides": {
                "routing.balance.load_balancing_loss.scope": _SCOPES[number % len(_SCOPES)],
                "routing.balance.load_balancing_loss.coefficient": 0.01 / (1 + number // len(_SCOPES)),
            }
        }
        for number in range(runs)
    }
    return {"name": "suite", "experiment": str(experiment), "runs": overrides}


def cost_of(path: Path, experiment: Path, runs: int, overrides: list[str]) -> Cost:
    """Trains and reports on a suite by the version at ``path``."""
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "suite.yaml"
        suite.write_text(yaml.safe_dump(suite_of(experiment, runs), sort_keys=False), encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": str(path), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
        environment.pop("OMP_NUM_THREADS", None)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(
            [*_LAUNCHER, "compare", str(suite), "--jobs", "2", *overrides, "tracking.mlflow=true"],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            cwd=folder,
            preexec_fn=lambda: os.sched_setaffinity(0, _CORES),
        )
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        results = json.loads((Path(folder) / "runs" / "suite" / "results.json").read_text(encoding="utf-8"))
        return Cost(wall, processor, {run["label"]: run["loss"]["mean"] for run in results["runs"]})


def main() -> None:
    """Prints the ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("commit", nargs="?", default="9340c6c")
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cache-dir", type=Path, default=Path("data_cache"))
    arguments = parser.parse_args()
    cache_dir = str(arguments.cache_dir.absolute())
    overrides = [f"training.steps={arguments.steps}", f"data.cache_dir={cache_dir}"]
    mix = _ROOT / "configs" / "mixes" / "packages8_v1024.yaml"
    subprocess.run([*_LAUNCHER, "data", "build", str(mix), "--cache-dir", cache_dir], check=True)
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        files = unpack(arguments.commit, Path(folder) / "files")
        then, now = lay_out(files, Path(folder) / "then"), lay_out(_ROOT, Path(folder) / "now")
        for number in range(arguments.rounds):
            versions = [(now, _ROOT), (then, files)]
            # Whatever comes first in a round may find colder files.
            costs = [
                cost_of(path, root / "configs" / "experiments" / "study.yaml", arguments.runs, overrides)
                for path, root in (versions if number % 2 else versions[::-1])
            ]
            pairs.append(costs if number % 2 else costs[::-1])
            for name, cost in zip(("now", "then"), pairs[-1], strict=True):
                print(f"round {number + 1}: {cost.wall:.0f} s, {cost.processor:.0f} s of processors {name}", flush=True)
    walls = statistics.median(now.wall / then.wall for now, then in pairs)
    processors = statistics.median(now.processor / then.processor for now, then in pairs)
    differences = [abs(now.losses[run] - then.losses[run]) for now, then in pairs for run in now.losses]
    print(
        f"a suite of {arguments.runs} runs of {arguments.steps} steps: {walls:.2f} x the time of {arguments.commit}, "
    )
    print(f"{processors:.2f} x its processor time; losses differ by at most {max(differences):.1e}")


if __name__ == "__main__":
    main()
