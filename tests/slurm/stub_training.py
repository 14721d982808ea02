"""Stands for `python3 -m moe_testbed.launcher train` in jobs: takes its arguments and keeps its promises on disk.

The label of the run, up to its first hyphen, says how it behaves after two of four steps; what it waits for is a file
in the suite's folder.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

import yaml

_MOST_SECONDS = 300
_ASKED_TO_STOP = 75


class _Stub:
    def __init__(self, run_dir: Path) -> None:
        config = yaml.safe_load((run_dir / "config.yaml").read_text())
        self.behaviour, self.steps = config["name"].partition("-")[0], config["training"]["steps"]
        self.run_dir, self.rank = run_dir, int(os.environ["RANK"])
        self.metrics = run_dir / "metrics.jsonl"
        self.step = len(self.metrics.read_text().splitlines()) if self.metrics.exists() else 0
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._stop)

    def train(self) -> None:
        print(json.dumps({**os.environ, "host": socket.gethostname()}))
        behave = getattr(self, f"_{self.behaviour}")
        if self.rank:
            behave()
            return
        self._note("starts")
        while self.step < self.steps:
            if self.step == 2:
                behave()
            self.step += 1
            with self.metrics.open("a") as file:
                file.write(json.dumps({"kind": "train", "step": self.step, "loss": 1.0}) + "\n")
            self._write("running")
        self._write("finished")
        self._note("ends")

    def _quick(self) -> None:
        pass

    def _waits(self) -> None:
        self._until((self.run_dir.parent / "go").exists)

    def _fails(self) -> None:
        """The first rank fails; the other one is ended with it, and does not end before."""
        if self.rank:
            self._until(lambda: False)
        self._write("failed", "RuntimeError: always the same")
        sys.exit(1)

    def _refuses(self) -> None:
        """Only one rank finds what is wrong; the other does not hear of it."""
        if self.rank == 1:
            print("moe-testbed: a value is wrong; mend it", file=sys.stderr)
            sys.exit(2)
        self._until(lambda: False)

    def _stops(self) -> None:
        """All ranks are told by others than the job, and have nothing to save."""
        self._write("stopped", "asked to stop by SIGUSR1 outside the steps")
        sys.exit(_ASKED_TO_STOP)

    def _dies(self) -> None:
        """One rank is killed in the first start; the other does not hear of it."""
        if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
            if self.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            self._until(lambda: False)

    def _stop(self, number: int, frame: FrameType | None) -> NoReturn:
        if self.rank == 0:
            mark = self.run_dir / f"checkpoints/step_{self.step:08d}/complete.json"
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self._write("stopped", f"asked to stop by {signal.Signals(number).name} after step {self.step}")
        self._note("stops")
        sys.exit(_ASKED_TO_STOP)

    def _write(self, state: str, reason: str | None = None) -> None:
        if self.rank == 0:
            content = {"state": state, "step": self.step, "steps": self.steps, "reason": reason}
            temporary = self.run_dir / ".status"
            temporary.write_text(json.dumps(content))
            os.replace(temporary, self.run_dir / "status.json")

    def _note(self, event: str) -> None:
        if self.rank == 0:
            with (self.run_dir.parent / "events.txt").open("a") as file:
                file.write(f"{event} {self.run_dir.name}\n")

    def _until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + _MOST_SECONDS
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)


if __name__ == "__main__":
    assert sys.argv[1:4] == ["-m", "moe_testbed.launcher", "train"] and sys.argv[5] == "--run-dir", sys.argv
    assert Path(sys.argv[4]) == Path(sys.argv[6]) / "config.yaml"
    _Stub(Path(sys.argv[6])).train()
