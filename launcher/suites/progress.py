"""Shows how far the running trainings are: in place on a terminal, as a line now and then elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from moe_testbed.launcher.run.records import Progress

SECONDS_BETWEEN_LINES = 15.0


class ProgressView:
    """Prints events at once and the state of running trainings at intervals."""

    def __init__(self, stream: TextIO, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._total, self._clock = stream, total, clock
        self._in_place = stream.isatty()
        self._drawn = 0
        self._started = clock()
        self._last = self._started
        self._first_seen: dict[str, tuple[float, int]] = {}

    def event(self, text: str) -> None:
        """Prints a line that stays."""
        self._erase()
        print(f"[{duration(self._clock() - self._started)}] {text}", file=self._stream, flush=True)

    def update(self, running: Sequence[tuple[str, Progress]], done: int) -> None:
        """Shows the running trainings, by name, if it is time to."""
        if not self._in_place and self._clock() - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = self._clock()
        lines = [self._line(name, progress) for name, progress in running]
        if not self._in_place:
            for line in lines:
                self.event(line)
            return
        self._erase()
        lines.append(f"{done} of {self._total} done, {duration(self._clock() - self._started)}")
        width = os.get_terminal_size(self._stream.fileno()).columns
        print("\n".join(line[: width - 1] for line in lines), file=self._stream, flush=True)
        self._drawn = len(lines)

    def close(self) -> None:
        """Removes what was drawn in place."""
        self._erase()

    def _erase(self) -> None:
        if self._drawn:
            self._stream.write(f"\x1b[{self._drawn}A\x1b[J")
            self._drawn = 0

    def _line(self, name: str, progress: Progress) -> str:
        now = self._clock()
        since, first = self._first_seen.setdefault(name, (now, progress.step))
        if progress.loss is None:
            return f"{name}: starting"
        text = f"{name}: step {progress.step:,} of {progress.steps:,}, loss {progress.loss:.3f}"
        if progress.step > first:
            left = (progress.steps - progress.step) * (now - since) / (progress.step - first)
            text += f", {duration(left)} left"
        return text


def duration(seconds: float) -> str:
    """Returns seconds as M:SS, or as H:MM:SS from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
