"""Starts the trainings of a suite as forks of its fork server, which begin at once."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.suites.fork_server import LONGEST_MESSAGE, MODULES, WITH_ABLATION
from moe_testbed.launcher.suites.processes import PARENT_VARIABLE, appending

_SERVER = (sys.executable, "-m", "moe_testbed.launcher.suites.fork_server")


class ServerLost(Exception):
    """The fork server has ended by itself."""


def forks_will_do(runs: Sequence[SuiteRun]) -> bool:
    """Tells whether these trainings can be forks: on Linux, without a GPU, which DeepSpeed looks for when it is
    imported. Elsewhere a fork of a process that has loaded torch is not safe, or has not been tried."""
    import torch

    gpu = torch.cuda.is_available()
    return sys.platform == "linux" and all(run.config.runtime.device == "cpu" or not gpu for run in runs)


def modules_of(runs: Sequence[SuiteRun]) -> list[str]:
    """Returns what these trainings import."""
    ablated = any(run.config.ablation.sequences_per_domain for run in runs)
    return [*MODULES, *(WITH_ABLATION if ablated else ())]


class Fork:
    """A training, with what `subprocess.Popen` has of its methods.

    Attributes:
        pid: number of the process, and of its group.
        returncode: the exit status, -N after signal N, None while it is not known.
    """

    def __init__(self, pid: int, forks: Forks) -> None:
        self.pid, self._forks = pid, forks
        self.returncode: int | Any = None

    def poll(self) -> int | None:
        """Returns the exit status; None while it runs."""
        if self.returncode is None:
            self._forks.listen(0.0)
        status: int | None = self.returncode
        return status

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status once there is one. Raises subprocess.TimeoutExpired."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired("moe-testbed", timeout or 0.0)
            self._forks.listen(left)
        return int(self.returncode)


class Forks:
    """Holds a fork server, started with the first training and again should it be lost.

    Args:
        environment: variables that the server and its forks get besides this process's own.
        modules: what the server imports.
    """

    def __init__(self, environment: Mapping[str, str], modules: Sequence[str] = MODULES) -> None:
        self._environment, self._modules = environment, modules
        self._server: subprocess.Popen[bytes] | None = None
        self._running: dict[int, Fork] = {}

    def start(self, arguments: Sequence[str], log: Path) -> Fork:
        """Starts a training with these arguments of `moe-testbed`, its output appended to ``log``.

        Raises:
            ServerLost: the server cannot import what a training needs, or has been killed.
        """
        if self._server is None:
            self._open()
        request = json.dumps({"arguments": list(arguments), "folder": os.getcwd()}).encode()
        self._connection.settimeout(None)
        with appending(log) as output, contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._connection, [request], [output.fileno()])
        while self._server is not None:
            if fork := self.listen(None):
                return fork
        raise ServerLost

    def _open(self) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [*_SERVER, str(theirs.fileno()), *self._modules],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **self._environment, PARENT_VARIABLE: str(os.getpid())},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def listen(self, seconds: float | None) -> Fork | None:
        """Takes what the server says next, if it says anything within this time; None: however long it takes.

        Returns:
            The training that has started, if that is what it says.
        """
        if self._server is None:
            return None
        self._connection.settimeout(seconds)
        try:
            message = self._connection.recv(LONGEST_MESSAGE)
        except (BlockingIOError, TimeoutError):
            return None
        except ConnectionResetError:
            message = b""
        if not message:
            self.close()
            return None
        said = json.loads(message)
        if "started" in said:
            fork = self._running[said["started"]] = Fork(said["started"], self)
            return fork
        self._running.pop(said["ended"]).returncode = said["status"]
        return None

    def pause(self, seconds: float) -> None:
        """Waits until a training ends, but no longer than this."""
        if self._server is None:
            time.sleep(seconds)
        else:
            self.listen(seconds)

    def close(self) -> None:
        """Ends the server; the kernel kills what it has started and still runs."""
        if self._server is None:
            return
        self._connection.close()
        self._server.kill()
        self._server.wait()
        self._server = None
        for fork in self._running.values():
            fork.returncode = -signal.SIGKILL
        self._running.clear()
