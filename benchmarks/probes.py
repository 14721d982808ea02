"""Does masked language modelling make a better encoder than an encoder-decoder model has? The table of docs/probes.md.

    python benchmarks/probes.py [--runs runs] [--tasks brown_pos brown_genre] [--labels mlm scratch]

Probes the runs of configs/suites/recipes.yaml, which `benchmarks/recipes.py` trains, unless that was done before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.probing import ProbingRecord, Score

TASKS = ("brown_pos", "turkish_pos", "brown_genre", "tune_metre")
LABELS = ("mlm", "scratch", "quarter")
# The spread is that over pre-trainings, and there are many of them to probe.
LESS = ("learning.seeds=[1]", "limits.train=8000", "limits.test=8000")
SEEDS = (1, 2, 3)
FLOORS = ("random model", "random table", "words alone", "majority")


def main() -> None:
    """Prints the table of scores."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--labels", nargs="+", default=LABELS)
    arguments = parser.parse_args()
    rows = [["task", "of", "linear", "fine-tuned"]]
    for task in arguments.tasks:
        found = {label: records(arguments.runs / "recipes", label, task) for label in arguments.labels}
        for label, of_label in found.items():
            scores = [record.rows[0] for record in of_label]
            linear, fine_tuned = ([getattr(row, column) for row in scores] for column in ("linear", "fine_tuned"))
            rows.append([task, f"`{label}`", over_trainings(linear), over_trainings(fine_tuned)])
        table = [record.rows[1].linear for record in found[arguments.labels[0]]]
        rows.append([task, f"the table of `{arguments.labels[0]}` alone", over_trainings(table), "–"])
        first = found[arguments.labels[0]][0]
        for name in FLOORS:
            floor = next(row for row in first.rows if row.name == name)
            rows.append([task, name, of_one(floor.linear), of_one(floor.fine_tuned)])
    print(json.dumps({"figures": {}, "tables": {"probes": rows}}, ensure_ascii=False))


def records(suite: Path, label: str, task: str) -> list[ProbingRecord]:
    """Returns what the task has found of a run under each seed."""
    folders = [suite / f"{label}-seed{seed}" for seed in SEEDS]
    missing = [folder for folder in folders if task not in (record.task for record in RunFolder(folder).read_probing())]
    if missing:
        command = [sys.executable, "-m", "moe_testbed.launcher", "probe", *map(str, missing), "--task", task, *LESS]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return [next(found for found in RunFolder(folder).read_probing() if found.task == task) for folder in folders]


def over_trainings(scores: list[Score]) -> str:
    """Returns the mean over trainings with their standard deviation."""
    values = [score.value for score in scores]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def of_one(score: Score | None) -> str:
    """Returns a score with its interval over documents."""
    return "–" if score is None else f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"


if __name__ == "__main__":
    main()
