"""Ranks as a scheduler starts them: processes of their own, which meet at a port, each on a host of another name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config
from tests.processes.python import Python

START_SECONDS = 240.0


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RealRanks:
    """`moe-testbed train` on several ranks; rank R is on the host ``nodeR``. Ends them when it is left.

    Args:
        content: of the experiment.
        folder: of the experiment's file and the logs.
        run_dir: of the run.
        port: where they meet; by default a free one.
        started: how many of them are started; by default all.
        interpreters: each is a Python started anew instead of a fork, for tests of how one ends.
    """

    def __init__(
        self,
        content: dict[str, Any],
        size: int,
        folder: Path,
        run_dir: Path,
        port: int | None = None,
        started: int | None = None,
        interpreters: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run_dir, self._logs = run_dir, [folder / f"rank_{rank}.log" for rank in range(started or size)]
        experiment = folder / "experiment.yaml"
        experiment.write_text(dump_config(ExperimentConfig.model_validate(content)), encoding="utf-8")
        command = ["-m", "moe_testbed.launcher", "train", str(experiment), "--run-dir", str(run_dir)]
        common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port())}
        common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
        self.processes: list[Python | subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self._logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "SLURMD_NODENAME": f"node{rank}"}
            environment = os.environ | common | own
            if interpreters:
                with log.open("wb") as output:
                    self.processes.append(
                        subprocess.Popen([sys.executable, *command], stdout=output, stderr=output, env=environment)
                    )
            else:
                self.processes.append(Python(*command, stdout=log, stderr=log, environment=environment))

    def __enter__(self) -> RealRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def status(self) -> dict[str, Any]:
        """The content of status.json, empty before there is one."""
        path = self.run_dir / "status.json"
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return content

    def wait_for_step(self, step: int) -> None:
        """Returns after so many steps; AssertionError if the ranks end, or do not come there in time."""
        until(lambda: self.status().get("step", 0) >= step or self._has_ended(), START_SECONDS, "no such step")
        assert not self._has_ended(), self.errors()

    def exit_codes(self, seconds: float, lost: tuple[int, ...] = ()) -> list[int]:
        """Of all ranks but those lost, which must end within this time."""
        others = [process for rank, process in enumerate(self.processes) if rank not in lost]
        until(lambda: all(process.poll() is not None for process in others), seconds, "the ranks did not end in time")
        return [process.returncode for process in others]

    def errors(self) -> str:
        """What all ranks have printed."""
        return "\n".join(log.read_text(encoding="utf-8", errors="replace") for log in self._logs)

    def _has_ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)


def until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Polls a condition; AssertionError if it does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
