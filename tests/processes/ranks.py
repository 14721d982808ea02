"""Runs a function on several ranks, each a process of its own.

A child finds the function by its file and name. The file must not import from ``tests``, which a child cannot; what
the function takes must be picklable, and what it returns readable by ``torch.load``.
"""

from __future__ import annotations

import multiprocessing.connection
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.processes.forkserver import fork

ENTRY = Path(__file__).with_name("rank.py")
TIMEOUT_SECONDS = 240.0
LAST_WORD_SECONDS = 12.0


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> list[Any]:
    """Calls ``function(*arguments)`` on every rank of a gloo group; what they print goes to stderr at the end.

    Returns:
        What it returned, by rank.

    Raises:
        AssertionError: a rank failed (the message has its traceback) or did not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_codes = _run(function, num_ranks, arguments, folder)
        assert not any(exit_codes), _failure(exit_codes, folder)
        return [torch.load(Path(folder) / f"{rank}.result", weights_only=False) for rank in range(num_ranks)]


def run_until_killed(function: Callable[..., Any], num_ranks: int, *arguments: Any) -> None:
    """Calls ``function(*arguments)`` on ranks that are to kill themselves; the death of one may end the others.

    Raises:
        AssertionError: none was killed, or one came to its end.
    """
    with tempfile.TemporaryDirectory() as folder:
        exit_codes = _run(function, num_ranks, arguments, folder)
        assert -signal.SIGKILL in exit_codes and 0 not in exit_codes, _failure(exit_codes, folder)


def _run(function: Callable[..., Any], num_ranks: int, arguments: tuple[Any, ...], folder: str) -> list[int | None]:
    children = []
    for rank in range(num_ranks):
        call = {
            "FUNCTION": (function.__code__.co_filename, function.__name__),
            "ARGUMENTS": arguments,
            "RANK": rank,
            "NUM_RANKS": num_ranks,
            "FOLDER": folder,
        }
        children.append(fork(ENTRY, call))
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        multiprocessing.connection.wait([child.sentinel for child in children if child.is_alive()], timeout=1.0)
        if any(child.exitcode for child in children):
            # The others wait for the one that failed; its reason is what matters. With a watchdog they tell it.
            deadline = min(deadline, time.monotonic() + LAST_WORD_SECONDS)
    exit_codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
        child.join()
    for log in sorted(Path(folder).glob("*.log")):
        print(log.read_text(encoding="utf-8", errors="replace"), file=sys.stderr)
    return exit_codes


def _failure(exit_codes: list[int | None], folder: str) -> str:
    reasons = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.error"))]
    return "\n".join([f"exit codes of the ranks: {exit_codes} (None: did not end in time)", *reasons])
