"""SIGUSR1 and SIGTERM ask a training to stop: a scheduler sends them before it takes the nodes away.

Within the steps, the request waits for the end of the step under way and for a checkpoint. Before the first step and
after the last one there is nothing to save, and the process ends at once.

Launchers send SIGTERM too, to all ranks of a node, when one of them has died. It is a request only if none has.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor

from moe_testbed.launcher.errors import ASKED_TO_STOP, FAILED, AskedToStop
from moe_testbed.launcher.ranks.ranks import Ranks

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class StopSignals:
    """Listens to the signals that ask this process to stop, from entering this context to leaving it.

    The signals come through a pipe to a thread: Python's own handlers wait for the main thread, which may be in a
    collective that never returns.

    Args:
        before_exit: is given the reason before the process ends at once.
        is_request: says whether a SIGTERM is a request to stop; called in the thread. If it is none, then what it is
            instead ends the process.
    """

    def __init__(self, before_exit: Callable[[AskedToStop], object], is_request: Callable[[], bool]) -> None:
        self._before_exit, self._is_request = before_exit, is_request
        self._requested: signal.Signals | None = None
        self._deferred = False
        self._lock = threading.Lock()

    def __enter__(self) -> StopSignals:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The pipe is written only for signals that Python handles.
        self._handlers_before: dict[signal.Signals, Any] = {
            number: signal.signal(number, _nothing) for number in SIGNALS
        }
        self._thread = threading.Thread(target=self._listen, name="stop signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def defer(self) -> None:
        """From now on a request waits until the ranks agree on it."""
        with self._lock:
            self._deferred = True

    def end_deferral(self) -> None:
        """From now on a request ends the process at once, one that waits included."""
        with self._lock:
            self._deferred = False
            if self._requested is not None:
                self._end()

    def requests(self, ranks: Ranks) -> dict[str, Tensor]:
        """Returns what the ranks must sum up, beside the values of a step, to agree; nothing if there is only one."""
        if ranks.group is None:
            return {}
        return {_key(number): torch.tensor(float(number == self._requested), device=ranks.device) for number in SIGNALS}

    def agreed(self, values: dict[str, float], ranks: Ranks) -> signal.Signals | None:
        """Returns the signal that some rank has received, the same on all ranks; None if there was none.

        Args:
            values: holds the sums or means over the ranks of `requests`, which are taken out, and others.
        """
        if ranks.group is None:
            return self._requested
        counts = {number: values.pop(_key(number)) for number in SIGNALS}
        return next((number for number, count in counts.items() if count), None)

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            # Others, such as SIGINT, come this way too.
            if received[0] not in SIGNALS:
                continue
            number = signal.Signals(received[0])
            if number is signal.SIGTERM and not self._is_request():
                continue
            with self._lock:
                self._requested = self._requested or number
                if not self._deferred:
                    self._end()

    def _end(self) -> None:
        assert self._requested is not None
        stop = AskedToStop(f"asked to stop by {self._requested.name} outside the steps")
        self._before_exit(stop)
        print(f"moe-testbed: {stop}; the same command continues", file=sys.stderr, flush=True)
        os._exit(ASKED_TO_STOP)


def end_before_rendezvous() -> NoReturn:
    """Ends a process that gets SIGTERM before the ranks have met, when none knows whether the others live. The run's
    status stays as after any sudden end."""
    print(
        "moe-testbed: ended by SIGTERM before the ranks had met; launchers send it when another rank has ended: see "
        "what that one says",
        file=sys.stderr,
        flush=True,
    )
    os._exit(FAILED)


def _nothing(*_: object) -> None:
    """Leaves the signal to the thread."""


def _key(number: signal.Signals) -> str:
    return f"asked to stop by {number.name}"
