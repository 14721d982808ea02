"""Work shared with a second process.

The second process is a command of this package, not one of `multiprocessing`: a fork hangs where torch has threads, and
other start methods run the caller's script anew unless it has a guard.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from moe_testbed.data.machine import usable_cores

WORTHWHILE = 12
"""A second process saves time from this number of items on: it takes a second to start, and an item a tenth of one."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_two(work: Callable[[Sequence[Item]], list[Result]], items: Sequence[Item]) -> list[Result]:
    """Returns `work(items)`, where `work` gives one result for each item; a second process does every other item.

    `work` is a function of a module that does with an item the same whatever the others are. Where a second process is
    of no use, or fails, this one does all items.
    """
    if len(items) < WORTHWHILE or usable_cores() < 2:
        return work(items)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_ask, pickle.dumps((work, items[1::2])))
        mine = work(items[::2])
    theirs: list[Result] = pickle.loads(answer.result()) if answer.result() else work(items[1::2])
    results = [*mine, *theirs]
    results[::2], results[1::2] = mine, theirs
    return results


def _ask(question: bytes) -> bytes:
    """Returns the pickled results of a second process; nothing if it fails."""
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, input=question, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else b""


def _serve() -> None:
    """Is the second process: the work comes in by stdin, its results go out by stdout."""
    work, items = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(work(items)))


if __name__ == "__main__":
    _serve()
