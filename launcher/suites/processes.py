"""Starts child processes that never outlive the one that started them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

PARENT_VARIABLE = "MOE_TESTBED_PARENT"
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Makes the kernel kill this process when the one that started it by `start` ends, even by kill -9. Linux only.

    Called by the child: set between fork and exec it would not be safe beside the parent's threads.
    """
    parent = os.environ.pop(PARENT_VARIABLE, None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


class Child(Protocol):
    """A process with a group of its own, with what `subprocess.Popen` has of its methods."""

    pid: int
    returncode: int | Any

    def poll(self) -> int | None:
        """Returns the exit status, -N after signal N; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status once there is one. Raises subprocess.TimeoutExpired."""


def appending(log: Path) -> BinaryIO:
    """Returns the file, made if it is not there, to which a child's output is appended."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("ab")


def start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Starts a child in a process group of its own, its output appended to ``log``."""
    variables = {**os.environ, **environment, PARENT_VARIABLE: str(os.getpid())}
    with appending(log) as output:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )


def stop(children: Sequence[Child], grace_seconds: float = 5.0) -> None:
    """Ends children and all that they started: SIGTERM, then SIGKILL for those still there."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(grace_seconds)
    for child in children:
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: Child, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)
