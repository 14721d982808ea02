"""What does looking at the routing add to a training?

    python benchmarks/routing_statistics.py [EXPERIMENT] [OVERRIDE ...]

One short training on one thread, of which every fourth step is looked at; what is done for a look (counting the batch,
routing the probe, writing the file) is timed inside it, so that both parts of the ratio meet the same machine. Printed
is what the experiment's own number of looks adds to its own number of steps. The first steps, in which memory is taken
for the first time, are left out.
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

from moe_testbed.launcher.config.experiment import load_experiment

_STEPS, _WARM, _EVERY = 120, 16, 4

_TRAIN = """
import json, sys, time
from pathlib import Path
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.train.train import train
from moe_testbed.launcher.ranks.rendezvous import choose_device
choose_device("cpu")
from moe_testbed.launcher.train.probe import Probe

spent = [0.0]
def timed(owner, name):
    original = getattr(owner, name)
    def replacement(*arguments):
        started = time.perf_counter()
        result = original(*arguments)
        spent[-1] += time.perf_counter() - started
        if name == "write_probe":
            spent.append(0.0)
        return result
    setattr(owner, name, replacement)

for owner, name in ((Probe, "add"), (Probe, "run"), (RunFolder, "write_probe")):
    timed(owner, name)
train(load_experiment(sys.argv[2], sys.argv[3:]), Path(sys.argv[1]))
print(json.dumps(spent))
"""


def seconds_per_look_and_step(experiment: str, overrides: list[str]) -> tuple[float, float]:
    """Returns the medians over one training."""
    short = [
        f"training.steps={_STEPS}",
        "training.warmup_steps=1",
        "evaluation.every=0",
        "evaluation.sequences_per_domain=1",
        f"probe.points={_STEPS // _EVERY}",
        "ablation.sequences_per_domain=0",
        "tracking.mlflow=false",
        "runtime.device=cpu",
        "runtime.threads=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _TRAIN, folder, experiment, *overrides, *short],
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    at = {line["step"]: line["seconds"] for line in lines if line["kind"] == "train"}
    # No look lies between the ends of these two steps.
    steps = [at[step + 1] - at[step] for step in range(_WARM, _STEPS - 1) if step % _EVERY == 1]
    looks = json.loads(done.stdout.splitlines()[-1])[_WARM // _EVERY : _STEPS // _EVERY - 1]
    return statistics.median(looks), statistics.median(steps)


def main() -> None:
    """Prints the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_experiment(arguments.experiment, arguments.overrides)
    look, step = seconds_per_look_and_step(arguments.experiment, arguments.overrides)
    points, steps = config.probe.points, config.training.steps
    ratio = 1 + look * points / (step * steps)
    print(
        f"step {1000 * step:.0f} ms, look {1000 * look:.0f} ms; {points} looks in {steps} steps: "
        f"{ratio:.4f} x the time without"
    )
    print(json.dumps({"figures": {"routing_statistics": f"{ratio:.3f} x the training without"}}))


if __name__ == "__main__":
    main()
