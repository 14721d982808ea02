"""What share of a training goes into looking: evaluations, probes, the ablation, and what is written?

    python benchmarks/looking.py [EXPERIMENT] [OVERRIDE ...]

One short training on one thread, with all that the experiment looks at, but fewer steps between two looks. Each part
is timed by the processor time of the process. Printed is what it takes in a training of the experiment's own steps,
evaluations, probes and checkpoints, beside its steps. The first steps, in which memory is taken for the first time, are
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

from moe_testbed.launcher.config.experiment import load_experiment

_STEPS, _WARM, _POINTS = 60, 10, 6
_SHORT = {
    "training.steps": _STEPS,
    "training.warmup_steps": 1,
    "evaluation.every": _STEPS // 3,
    "probe.points": _POINTS,
    "checkpoint.every": _STEPS // 3,
    "tracking.mlflow": "false",
    "runtime.device": "cpu",
    "runtime.threads": 1,
}

_TRAIN = """
import json, sys, time
from collections import defaultdict
from pathlib import Path
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.ranks.rendezvous import choose_device
choose_device("cpu")
from moe_testbed.launcher.train import loop
from moe_testbed.launcher.train.train import train

spent = defaultdict(list)
def timed(part, owner, name):
    original = getattr(owner, name)
    def replacement(*arguments, **options):
        started = time.process_time()
        result = original(*arguments, **options)
        spent[part].append(time.process_time() - started)
        return result
    setattr(owner, name, replacement)

timed("step", loop, "train_step")
timed("evaluation", loop.Evaluator, "run")
timed("evaluation written", loop.RunFolder, "write_evaluation")
timed("probe", loop.Probe, "run")
timed("probe written", loop.RunFolder, "write_probe")
timed("ablation", loop, "ablate_model")
timed("metrics of a step", loop.RunFolder, "append_metrics")
timed("status of a step", loop.RunFolder, "write_status")
timed("checkpoint", loop.checkpoints, "save")
train(load_experiment(sys.argv[2], sys.argv[3:]), Path(sys.argv[1]))
print(json.dumps(spent))
"""


def seconds_of_parts(experiment: str, overrides: list[str]) -> dict[str, float]:
    """Returns the median processor time of each part of one training."""
    short = [f"{key}={value}" for key, value in _SHORT.items()]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", _TRAIN, folder, experiment, *overrides, *short],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    spent = json.loads(done.stdout.splitlines()[-1])
    spent["step"] = spent["step"][_WARM:]
    return {part: statistics.median(times) for part, times in spent.items()}


def main() -> None:
    """Prints the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    config = load_experiment(arguments.experiment, arguments.overrides)
    steps = config.training.steps

    def times(every: int) -> int:
        """How often what happens after so many steps, and after the last one, happens."""
        return -(-steps // every) if every else 1

    evaluations, probes = times(config.evaluation.every), config.probe.points
    numbers = {
        "step": steps,
        "evaluation": evaluations,
        "evaluation written": evaluations,
        "probe": probes,
        "probe written": probes,
        "ablation": 1,
        "metrics of a step": steps,
        "status of a step": steps,
        "checkpoint": times(config.checkpoint.every),
    }
    cost = seconds_of_parts(arguments.experiment, arguments.overrides)
    totals = {part: cost[part] * number for part, number in numbers.items() if part in cost}
    everything = sum(totals.values())
    for part, seconds in totals.items():
        print(f"{part}: {numbers[part]} x {1000 * cost[part]:.2f} ms, {seconds / everything:.1%}")
    looking = everything - totals["step"] - totals["checkpoint"]
    print(f"looking and writing: {looking / everything:.1%} of {everything:.0f} s")


if __name__ == "__main__":
    main()
