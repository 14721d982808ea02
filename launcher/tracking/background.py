"""Does work that nobody may wait for: in a daemon thread, its failures told once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

from moe_testbed.launcher.tracking.refusal import Refused, in_short


class Background:
    """Calls a function again and again in a daemon thread, and a last one that is waited for, but not for ever.

    Args:
        failure: what is told on stderr, followed by the reason, when a call fails. Of any number of failures only the
            first is told.
        refusal: what is told before a `Refused`. Each is told once.
    """

    def __init__(self, failure: str, refusal: str) -> None:
        self._failure, self._refusal = failure, refusal
        self._told: set[str] = set()
        self.away = False
        """Whether the last attempt failed, and for another reason than a `Refused`."""
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, call: Callable[[], object], interval: float, at_once: bool = False) -> None:
        """Calls ``call`` after every ``interval`` seconds from now on, and also ``at_once``."""
        if self._thread is None:
            first = 0.0 if at_once else interval
            self._thread = threading.Thread(
                target=self._repeat, args=(call, first, interval), name="mirror", daemon=True
            )
            self._thread.start()

    def attempt(self, call: Callable[[], object]) -> bool:
        """Tells whether ``call`` raised nothing; what it raised is printed."""
        self.away = False
        try:
            call()
        except Refused as refused:
            self._tell(str(refused), f"{self._refusal}: {refused}")
            return False
        except Exception as error:  # whatever a store's driver raises, training goes on
            self.away = True
            self._tell(self._failure, f"{self._failure}: {in_short(error)}")
            return False
        return True

    def end(self, call: Callable[[], bool], seconds: float) -> bool:
        """Ends the repeated calls and makes this last one.

        Returns:
            What it returned; False if it failed, or if ``seconds`` were over before: its thread ends with the process.
        """
        self._ended.set()
        results: list[bool] = []
        last = threading.Thread(target=self._after_the_others, args=(call, results), name="mirror-end", daemon=True)
        last.start()
        last.join(seconds)
        if last.is_alive():
            self._tell(self._failure, f"{self._failure}: no end within {seconds:g} seconds")
        return results == [True]

    def _repeat(self, call: Callable[[], object], first: float, interval: float) -> None:
        seconds = first
        while not self._ended.wait(seconds):
            self.attempt(call)
            seconds = interval

    def _after_the_others(self, call: Callable[[], bool], results: list[bool]) -> None:
        if self._thread is not None:
            self._thread.join()
        self.attempt(lambda: results.append(call()))

    def _tell(self, what: str, line: str) -> None:
        if what not in self._told:
            self._told.add(what)
            print(line, file=sys.stderr)
