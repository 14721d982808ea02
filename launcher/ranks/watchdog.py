"""Ends a rank that cannot go on without another one, within a set time and with one message that says which.

Each process group bounds its collectives, whose errors the main thread meets, except with NCCL, which lets it wait and
then aborts the process. A thread of its own tells errors to the other ranks and listens for theirs. It also gives signs
of life and looks at another rank's, so that a lost one is found whatever the main threads wait for. A second thread
notices when the store through which all this goes does not answer. A single process has none of them.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import torch.distributed as dist

from moe_testbed.launcher.config.experiment import ParallelConfig
from moe_testbed.launcher.errors import (
    ASKED_TO_STOP,
    FAILED,
    WRONG_INPUT,
    AskedToStop,
    LostRankError,
    OtherRankError,
)
from moe_testbed.launcher.ranks.heartbeat import Alarm, CheckIn, reason_of
from moe_testbed.launcher.ranks.ranks import Ranks

# In seconds; from the error of a collective to the last rank's end they add up to less than ten.
_POLL = 0.5  # between two looks for an alarm
_CHECK_IN = 4.5  # for ranks to say that they are alive
_ANSWER = 2.0  # for the rank that speaks to say who is not
_PATIENCE = 2.5  # for the main thread to end by itself

# Of the time-out, for a rank without a sign of life: who is lost must be told before NCCL aborts the others.
_SILENCE = 2 / 3

_EXIT_STATUS = {"mendable": WRONG_INPUT, "stopped": ASKED_TO_STOP}


def bound_groups(seconds: float) -> None:
    """Sets how long a collective of any process group of this rank waits for the others."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Watchdog:
    """Watches over the other ranks until it is closed. Ends the process itself if the main thread does not.

    Args:
        ranks: that have joined.
        parallel: the bounds.
        steps: of the whole training.
        note: takes a state and a reason for the run's status; called on rank 0 and on the rank that speaks for all,
            more than once.
    """

    def __init__(self, ranks: Ranks, parallel: ParallelConfig, steps: int, note: Callable[[str, str], object]) -> None:
        self._ranks, self._parallel, self._steps, self._note = ranks, parallel, steps, note
        self._silence = _SILENCE * parallel.timeout_seconds
        self._step: int | None = None
        self._mine: Alarm | None = None
        self._ending: Alarm | None = None
        self._notes = ranks.rank == 0
        self._inquiry: threading.Event | None = None
        self._changed, self._decided, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._closing = False
        self._turns = 0
        self._first = "rank 0"
        if ranks.group is not None:
            self._check_in = CheckIn(dist.distributed_c10d._get_default_store(), ranks.rank, ranks.size)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
            threading.Thread(target=self._watch_the_store, name="store", daemon=True).start()

    def passed(self, step: int) -> None:
        """The ranks have completed so many steps. From the first one on they are warm and wait less."""
        if self._step is None and self._ranks.group is not None:
            bound_groups(self._parallel.timeout_seconds)
        self._step = step

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Lets ranks wait longer for one another, as they do when they start."""
        if self._ranks.group is None:
            yield
            return
        bound_groups(self._parallel.slow_timeout_seconds)
        yield
        # Some may have more to do than others, such as removing old files.
        dist.barrier()
        bound_groups(self._parallel.timeout_seconds)

    def close(self) -> None:
        """Ends the watch, when all ranks have come here."""
        if self._ranks.group is not None:
            # From here on the store may vanish: rank 0 may be the first to end.
            self._closing = True
            dist.barrier()
            self._closed.set()
            self._changed.set()
            self._thread.join(_POLL)

    def all_alive(self) -> bool:
        """Asks all ranks. If one does not answer, or has met an error, the watchdog ends this process."""
        if self._ranks.group is None:
            return True
        self._inquiry = inquiry = threading.Event()
        self._changed.set()
        while not (inquiry.wait(_POLL / 10) or self._ending or self._closed.is_set()):
            pass
        return self._ending is None

    def explain(self, error: BaseException) -> BaseException:
        """Tells the others and the run's status that this rank has met an error.

        Returns:
            What this rank is to end with: the error itself, or what has happened to another rank.
        """
        self._mine = Alarm.of(self._ranks.rank, error)
        if self._ranks.group is None or self._closed.is_set():
            self._note(self._mine.state, str(error) if self._mine.kind == "stopped" else reason_of(error))
            return error
        self._changed.set()
        self._decided.wait()
        # The loop may have written that it runs since the thread has noted the end.
        self._note_ending()
        return self._cause() if self._mine.kind == "transport" else error

    def _watch(self) -> None:
        try:
            self._listen()
        except (RuntimeError, TimeoutError):
            # Rank 0 takes the store along, perhaps before this rank's main thread has left the barrier at the end.
            if not (self._closing and self._closed.wait(_PATIENCE)):
                self._lose_the_store()

    def _listen(self) -> None:
        beats, beaten = -1, time.monotonic()
        while not self._closed.is_set():
            self._turns += 1
            self._first = self._check_in.names([0])
            if (count := self._check_in.beat()) != beats:
                beats, beaten = count, time.monotonic()
            inquiry = self._inquiry
            if alarm := self._mine or self._suspicion(inquiry, time.monotonic() - beaten):
                self._check_in.sound(alarm)
            if alarm := self._check_in.heard():
                if self._conclude(alarm):
                    return
                beaten = time.monotonic()
                if inquiry:
                    inquiry.set()
            self._changed.wait(_POLL)
            self._changed.clear()

    def _suspicion(self, inquiry: threading.Event | None, silent: float) -> Alarm | None:
        if inquiry and not inquiry.is_set():
            return Alarm("suspected", self._ranks.rank, f"rank {self._ranks.rank} was sent SIGTERM")
        if silent > self._silence:
            return Alarm("suspected", self._ranks.rank, f"no sign of life for {self._silence:.3g} s")
        return None

    def _conclude(self, alarm: Alarm) -> bool:
        """Ends this rank, unless the alarm was a false one."""
        if alarm.kind in ("transport", "suspected"):
            verdict, speaks = self._find_the_lost(alarm)
            if not verdict:
                self._check_in.begin_anew()
                return False
            alarm = replace(alarm, kind="transport", reason=verdict)
            self._end(alarm, speaks)
        else:
            if alarm.kind == "failed":
                alarm = replace(alarm, reason=self._words(f"{self._check_in.names([alarm.rank])} was lost", alarm))
            self._end(alarm, speaks=alarm.rank == self._ranks.rank)
        self._check_in.leave()
        if self._ranks.rank == 0:
            lost = self._check_in.missing() if alarm.kind == "transport" else []
            self._check_in.wait_for_others(lost, _ANSWER)
        self._decided.set()
        return True

    def _find_the_lost(self, alarm: Alarm) -> tuple[str, bool]:
        """The verdict, empty if no rank is lost, and whether this rank has found it for all."""
        self._check_in.present()
        speaks, until = False, time.monotonic() + _CHECK_IN
        if alarm.kind == "transport":
            while time.monotonic() < until and not self._mine:
                time.sleep(_POLL / 10)
            if self._mine:
                self._check_in.waited()
            time.sleep(max(0.0, until - time.monotonic()))
            speaks = self._check_in.speaks()
        elif speaks := self._check_in.speaks():
            # All may be well, and then nobody is to be kept.
            self._check_in.wait_for_all(_CHECK_IN)
        if speaks:
            who = self._who(alarm)
            self._check_in.tell(self._words(who, alarm) if who else "")
        return self._check_in.told(until + _ANSWER - time.monotonic()), speaks

    def _who(self, alarm: Alarm) -> str:
        if missing := self._check_in.missing():
            return f"{self._check_in.names(missing)} {'were' if len(missing) > 1 else 'was'} lost"
        if alarm.kind == "suspected":
            return ""
        if late := self._check_in.late():
            return f"{self._check_in.names(late)} kept the others waiting for too long"
        return "all ranks lost their connections"

    def _words(self, who: str, alarm: Alarm) -> str:
        when = "while the ranks started" if self._step is None else f"in step {self._step + 1}"
        if self._step == self._steps:
            when = "after the last step"
        return f"{who} {when} ({alarm.reason})"

    def _watch_the_store(self) -> None:
        # Turns are counted, not time: after a pause of the whole process both threads go on.
        turns, quiet = self._turns, 0.0
        while not (self._closed.wait(_POLL) or self._decided.is_set()):
            quiet = quiet + _POLL if self._turns == turns else 0.0
            turns = self._turns
            # So long may a turn take in which ranks check in.
            if quiet > self._silence + _CHECK_IN + _ANSWER:
                self._lose_the_store()

    def _lose_the_store(self) -> None:
        if self._ending is None:
            seen = self._mine.reason if self._mine else "it keeps the store by which ranks meet, which does not answer"
            alarm = Alarm("transport", self._ranks.rank, seen)
            self._end(replace(alarm, reason=self._words(f"{self._first} was lost", alarm)), speaks=True)
        self._decided.set()

    def _end(self, alarm: Alarm, speaks: bool) -> None:
        self._ending = alarm
        self._notes |= speaks
        if speaks and alarm.kind in ("transport", "failed"):
            print(f"moe-testbed: {alarm.reason}", file=sys.stderr, flush=True)
        self._note_ending()
        if self._mine is None or self._mine.kind == "transport":
            timer = threading.Timer(_PATIENCE, self._leave_the_main_thread_behind)
            timer.daemon = True
            timer.start()

    def _leave_the_main_thread_behind(self) -> None:
        self._note_ending()
        sys.stderr.flush()
        os._exit(_EXIT_STATUS.get(self._ending.kind if self._ending else "", FAILED))

    def _note_ending(self) -> None:
        if self._notes and self._ending:
            self._note(self._ending.state, self._ending.reason)

    def _cause(self) -> BaseException:
        assert self._ending is not None
        if self._ending.kind == "mendable":
            return OtherRankError(f"another rank ended with {self._ending.reason}")
        return (AskedToStop if self._ending.kind == "stopped" else LostRankError)(self._ending.reason)
