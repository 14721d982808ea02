"""Stands for `moe-testbed train` in the tests of the scheduler: takes its arguments and keeps its promises on disk.

The label of the run says how it behaves; every start is noted in events.txt of the suite's folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

from moe_testbed.launcher.suites.processes import end_with_parent


def main() -> None:
    end_with_parent()
    config_path, option, run_dir = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    assert option == "--run-dir" and config_path == run_dir / "config.yaml"
    config = yaml.safe_load(config_path.read_text())
    events = run_dir.parent / "events.txt"
    note(events, f"start {run_dir.name} {os.getpid()} {os.environ.get('OMP_NUM_THREADS')}")
    behaviour, steps = config["name"], config["training"]["steps"]
    metrics = run_dir / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    for step in range(done + 1, steps + 1):
        with metrics.open("a") as file:
            file.write(json.dumps({"kind": "train", "step": step, "loss": 5.0 / step}) + "\n")
        status(run_dir, "running", step, steps)
        if step == 2 and behaviour == "wrong_input":
            print("moe-testbed: a value is wrong; mend it", file=sys.stderr)
            sys.exit(2)
        if step >= 2 and behaviour == "always_fails":
            status(run_dir, "failed", step, steps, "RuntimeError: always the same")
            print("Traceback ...\nRuntimeError: always the same", file=sys.stderr)
            sys.exit(1)
        if step < steps and behaviour == "fails_differently":
            print(f"RuntimeError: at step {step}", file=sys.stderr)
            sys.exit(1)
        if step == 2 and done == 0 and behaviour == "dies_once":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and done == 0 and behaviour == "is_stopped_once":
            status(run_dir, "stopped", step, steps, "asked to stop by SIGUSR1 after step 2")
            sys.exit(75)
        if step == 2 and behaviour.startswith("meets"):
            until(lambda: events.read_text().count("start ") >= 2)
        if step == 2 and behaviour == "hangs":
            until(lambda: False)
    if behaviour != "lies":
        status(run_dir, "finished", steps, steps)
    note(events, f"end {run_dir.name}")


def status(run_dir: Path, state: str, step: int, steps: int, reason: str | None = None) -> None:
    text = json.dumps({"state": state, "step": step, "steps": steps, "reason": reason})
    temporary = run_dir / ".status"
    temporary.write_text(text)
    os.replace(temporary, run_dir / "status.json")


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:  # type: ignore[operator]
        time.sleep(0.02)


if __name__ == "__main__":
    main()
