"""The commands of the product in a small world, each in a process of its own, and what they leave behind."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

from tests.campaign.world import environment, write_world
from tests.processes.python import Python, run_python
from tests.train.results import read_arrays, read_metrics, read_weights

RUN = "runs/one"
COMMANDS = {
    "build": ("data", "build", "mix.yaml"),
    "train": ("train", "experiment.yaml", "--run-dir", RUN),
    "compare": ("compare", "suite.yaml", "--jobs", "2"),
    "report": ("report", "runs/pair"),
    "analyze": ("analyze", "--checkpoint", RUN, "--mix", "mix.yaml", "--out", "runs/analysis"),
    "sync": ("sync", RUN),
}
MODULE = ("-m", "moe_testbed.launcher")
BEFORE_STEP_11 = """
import os, signal, sys
from moe_testbed.launcher.train import loop
step, calls = loop.train_step, []
def train_step(*arguments):
    calls.append(1)
    if len(calls) == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*arguments)
loop.train_step = train_step
from moe_testbed.launcher.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
LOCKS = {".lock", ".mlflow.lock"}

Result = subprocess.CompletedProcess[str]


def run(command: str, folder: Path, **variables: str) -> Result:
    """Runs a command of `COMMANDS` in a world to its end."""
    return run_python(*MODULE, *COMMANDS[command], folder=folder, environment=environment(folder, **variables))


def start(command: str, folder: Path, log: Path, **variables: str) -> Python:
    """Starts a command of `COMMANDS` in a world."""
    return Python(
        *MODULE, *COMMANDS[command], stdout=log, stderr=log, folder=folder, environment=environment(folder, **variables)
    )


def prepare(folder: Path, *commands: str) -> Path:
    """Makes a world in which these commands have been run. `interrupted` is a training killed before its 11th step."""
    write_world(folder)
    for command in commands:
        if command == "interrupted":
            done = run_python("-c", BEFORE_STEP_11, *COMMANDS["train"], folder=folder, environment=environment(folder))
            assert done.returncode == -9, done.stderr
        else:
            done = run(command, folder)
            assert done.returncode == 0, done.stderr
    return folder


def outcome(command: str, folder: Path) -> dict[str, Any]:
    """Returns what a command has made, without what depends on the clock: part -> a value that can be compared."""
    if command == "build":
        stores = sorted(path for path in (folder / "data_cache" / "stores").rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in stores if path.suffix != ".lock"}
    if command == "train":
        return run_outcome(folder / RUN)
    if command == "compare":
        runs = {path.name: run_outcome(path) for path in sorted((folder / "runs/pair").glob("*-seed*"))}
        return {
            **{f"{run}/{name}": value for run, parts in runs.items() for name, value in parts.items()},
            **results(folder / "runs/pair"),
        }
    if command == "sync":
        return in_mlflow(folder / "mlflow.db")
    return results(folder / ("runs/pair" if command == "report" else "runs/analysis"))


def run_outcome(run_dir: Path) -> dict[str, Any]:
    """Returns metrics, arrays and final weights of a run."""
    status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    weights = {name: value.numpy().tobytes() for name, value in read_weights(run_dir).items()}
    return {"status": status, "metrics.jsonl": read_metrics(run_dir), **read_arrays(run_dir), "weights": weights}


def results(suite_dir: Path) -> dict[str, Any]:
    """Returns the numbers of a report that do not depend on the machine, and whether its page is there."""
    content = json.loads((suite_dir / "results.json").read_text(encoding="utf-8"))
    return {"results.json": _without_times(content), "page": (suite_dir / "report.html").is_file()}


def in_mlflow(database: Path) -> dict[str, Any]:
    """Returns what an MLflow store of SQLite holds of the runs, as its tables say."""
    with sqlite3.connect(database) as connection:
        runs = connection.execute("select count(*), min(status), max(status) from runs").fetchall()
        metrics = connection.execute(
            "select key, step, value from metrics "
            "where key not like 'system/%' and key not like '%per_second' order by key, step"
        ).fetchall()
    return {"runs": runs, "metrics": metrics}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_times(one)
            for key, one in value.items()
            if not any(word in key for word in ("second", "time", "memory"))
        }
    return [_without_times(one) for one in value] if isinstance(value, list) else value


def difference(found: dict[str, Any], expected: dict[str, Any], exempt: frozenset[str] = frozenset()) -> str | None:
    """Returns in which part two outcomes differ; None if in none that is not exempt."""
    for name in sorted(found.keys() | expected.keys()):
        if name not in exempt and found.get(name) != expected.get(name):
            kind = "missing" if name not in found else "new" if name not in expected else "not the same"
            return f"{name} is {kind}"
    return None


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LOCKS)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def copied(folder: Path, to: Path) -> Path:
    """Copies a world, with the files' times, by which a store knows its sources."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def complaint(result: Result) -> str | None:
    """Returns what is wrong with how a command has ended that may refuse to work: by one line, and status 2."""
    if "Traceback" in result.stderr:
        return f"a traceback: {result.stderr.strip().splitlines()[-1]}"
    if result.returncode not in (0, 2):
        return f"status {result.returncode}: {' | '.join(result.stderr.strip().splitlines()[-2:])}"
    if result.returncode == 2 and not result.stderr.rstrip("\n").split("\n")[-1].startswith("moe-testbed: "):
        return f"status 2 without a line that says why: {result.stderr[-300:]}"
    return None
