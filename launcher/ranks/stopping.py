"""SIGUSR1 and SIGTERM ask a training to stop: a scheduler sends them before it takes the nodes away.

Within the steps the wish waits for the end of the one under way and a checkpoint. Before the first step and after the
last one there is nothing to save, and the process ends at once.

Launchers send SIGTERM too, to all ranks of a node when one of them has died. It is a wish only if none has.
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


class Stopping:
    """The wish to stop, from entering this context to leaving it.

    The signals come through a pipe to a thread: Python's own handlers wait for the main thread, which may be in a
    collective that never returns.

    Args:
        alone: there are no other ranks.

    Attributes:
        note: told before the process ends at once.
        all_alive: asked at a SIGTERM. If it says no, it ends the process.
    """

    def __init__(self, alone: bool = True) -> None:
        self.note: Callable[[AskedToStop], object] = lambda stop: None
        self.all_alive: Callable[[], bool] = (lambda: True) if alone else _end_without_the_others
        self._asked: signal.Signals | None = None
        self._held = False
        self._lock = threading.Lock()

    def __enter__(self) -> Stopping:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The pipe is written only for signals that Python handles.
        self._before: dict[signal.Signals, Any] = {number: signal.signal(number, _nothing) for number in SIGNALS}
        self._thread = threading.Thread(target=self._listen, name="stopping", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.close(self._writer)
        self._thread.join()
        os.close(self._reader)

    def hold(self) -> None:
        """From now on a wish waits until it is agreed on."""
        with self._lock:
            self._held = True

    def let_go(self) -> None:
        """From now on a wish ends the process at once, one that waits too."""
        with self._lock:
            self._held = False
            if self._asked is not None:
                self._end()

    def wishes(self, ranks: Ranks) -> dict[str, Tensor]:
        """What the ranks add up to agree, beside the values of a step; nothing if there is only one."""
        if ranks.group is None:
            return {}
        return {_key(number): torch.tensor(float(number == self._asked), device=ranks.device) for number in SIGNALS}

    def agreed(self, values: dict[str, float], ranks: Ranks) -> signal.Signals | None:
        """The signal that some rank has received, which all ranks learn alike; None if there was none.

        Args:
            values: the sums or means over the ranks of `wishes`, which are taken out, and others.
        """
        if ranks.group is None:
            return self._asked
        counts = {number: values.pop(_key(number)) for number in SIGNALS}
        return next((number for number, count in counts.items() if count), None)

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            # Others, such as SIGINT, come this way too.
            if received[0] not in SIGNALS:
                continue
            number = signal.Signals(received[0])
            if number is signal.SIGTERM and not self.all_alive():
                continue
            with self._lock:
                self._asked = self._asked or number
                if not self._held:
                    self._end()

    def _end(self) -> None:
        assert self._asked is not None
        stop = AskedToStop(f"asked to stop by {self._asked.name} outside the steps")
        self.note(stop)
        print(f"moe-testbed: {stop}; the same command continues", file=sys.stderr, flush=True)
        os._exit(ASKED_TO_STOP)


def _end_without_the_others() -> NoReturn:
    """Before the ranks have met, none knows of another; the run's status stays as after any sudden end."""
    print(
        "moe-testbed: ended by SIGTERM before the ranks had met; launchers send it when another rank has ended: see "
        "what that one says",
        file=sys.stderr,
        flush=True,
    )
    os._exit(FAILED)


def _nothing(*_: object) -> None:
    """The thread takes care of the signal."""


def _key(number: signal.Signals) -> str:
    return f"asked to stop by {number.name}"
