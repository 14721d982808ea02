"""The watchdog: a rank that cannot go on without another one ends within a set time, with one message that names it.

The protocol, in order. All that ranks say goes through the store by which they have met (`heartbeat.CheckIn`).

1. **Everyone beats.** A thread on every rank, the watchdog's, gives a sign of life each half second, whatever the main
   thread waits for.
2. **Someone sounds the alarm.** A rank whose main thread meets an error says what kind of error it is (`explain`, see
   `heartbeat.Alarm`): transport, mendable, diverged, stopped or failed. A rank that sees no sign of life of the next
   rank for two thirds of ``parallel.timeout_seconds`` sounds "suspected", which finds a lost rank where no collective
   fails; so does one that gets SIGTERM outside the steps (`all_alive`). The first alarm counts, and every watchdog
   hears it.
3. **All check in**, if the alarm is "transport" or "suspected", so that a rank may be lost. Each watchdog says that its
   rank is alive; where the main thread has met an error of the transport too, it also says that it has waited for the
   others. All have the same few seconds for this.
4. **One speaks.** The first rank that asks for it gives the verdict: the ranks that have not checked in were lost; if
   all have, those that did not wait kept the others waiting. If all have after a mere suspicion, the alarm was false,
   and everyone goes on with 1. After the other kinds of alarm nothing has to be found out, and the rank that has
   sounded the alarm speaks.
5. **All end.** The rank that speaks prints the verdict; it and rank 0 note it in the run's status. The main thread
   raises it as its error when it comes to `explain`. If it does not within a short time, since it waits in a collective
   that never returns, the watchdog ends the process. Rank 0, whose process keeps the store, ends after the others.
6. **Without the store** none of this works. A second thread notices that the first one makes no turns any more: rank 0
   is lost, and each rank speaks for itself.

After the last step the ranks close the watch together. A single process has no watchdog threads.
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
_POLL = 0.5  # between two signs of life, and two looks for an alarm
_CHECK_IN = 4.5  # for the ranks to check in
_ANSWER = 2.0  # for the rank that speaks to give the verdict
_PATIENCE = 2.5  # for the main thread to end by itself

# The part of the time-out after which a rank without a sign of life is suspected: who is lost must be known before NCCL
# aborts the others.
_SILENCE = 2 / 3

_EXIT_STATUS = {"mendable": WRONG_INPUT, "diverged": WRONG_INPUT, "stopped": ASKED_TO_STOP}


def bound_groups(seconds: float) -> None:
    """Sets how long a collective of any process group of this rank waits for the others."""
    for group in dist.distributed_c10d._world.pg_map:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


class Watchdog:
    """Watches over the other ranks until it is closed. Ends the process itself if the main thread does not.

    The main thread calls the public methods; `all_alive` is called by the thread that gets the signals.

    Args:
        ranks: ranks that have met.
        parallel: how long ranks wait for one another.
        steps: optimizer steps of the whole training.
        note_end: takes a state and a reason for the run's status; called on rank 0 and on the rank that speaks for all,
            more than once.
    """

    def __init__(
        self, ranks: Ranks, parallel: ParallelConfig, steps: int, note_end: Callable[[str, str], object]
    ) -> None:
        self._ranks, self._parallel, self._steps, self._note_end = ranks, parallel, steps, note_end
        self._silence = _SILENCE * parallel.timeout_seconds
        self._step: int | None = None  # completed ones; None before the first
        self._mine: Alarm | None = None  # of this rank's main thread
        self._ending: Alarm | None = None  # by which this rank ends
        self._notes = ranks.rank == 0
        self._inquiry: threading.Event | None = None  # set when all ranks have turned out to be alive
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
        """Notes that the ranks have completed so many steps. From the first one on they are warm and wait less."""
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
        """Asks whether all ranks live. If one does not answer, or has met an error, the watchdog ends this process."""
        if self._ranks.group is None:
            return True
        self._inquiry = inquiry = threading.Event()
        self._changed.set()
        while not (inquiry.wait(_POLL / 10) or self._ending or self._closed.is_set()):
            pass
        return self._ending is None

    def explain(self, error: BaseException) -> BaseException:
        """Makes an error that this rank has met known to the others and to the run's status.

        Returns:
            The error that this rank is to end with: the same one, or what has happened to another rank.
        """
        self._mine = Alarm.of(self._ranks.rank, error)
        if self._ranks.group is None or self._closed.is_set():
            if self._notes:
                reason = self._mine.reason if self._mine.kind in ("stopped", "diverged") else reason_of(error)
                self._note_end(self._mine.state, reason)
            return error
        self._changed.set()
        self._decided.wait()
        # The loop may have written that it runs since the thread has noted the end.
        self._note_ending()
        return self._cause() if self._mine.kind == "transport" else error

    # Steps 1 and 2: the watchdog's thread beats, sounds alarms and hears them.

    def _watch(self) -> None:
        try:
            self._beat_and_listen()
        except (RuntimeError, TimeoutError):
            # Rank 0 takes the store along, perhaps before this rank's main thread has left the barrier at the end.
            if not (self._closing and self._closed.wait(_PATIENCE)):
                self._lose_the_store()

    def _beat_and_listen(self) -> None:
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
        """Ends this rank, unless the alarm was false."""
        if alarm.kind in ("transport", "suspected"):
            verdict, speaks = self._find_the_lost(alarm)
            if not verdict:
                self._check_in.begin_anew()
                return False
            alarm = replace(alarm, kind="transport", reason=verdict)
            self._end(alarm, speaks)
        else:
            if alarm.kind == "failed":
                alarm = replace(alarm, reason=self._sentence(f"{self._check_in.names([alarm.rank])} was lost", alarm))
            self._end(alarm, speaks=alarm.rank == self._ranks.rank)
        self._check_in.leave()
        if self._ranks.rank == 0:
            lost = self._check_in.missing() if alarm.kind == "transport" else []
            self._check_in.wait_for_others(lost, _ANSWER)
        self._decided.set()
        return True

    # Steps 3 and 4: all check in, and one speaks.

    def _find_the_lost(self, alarm: Alarm) -> tuple[str, bool]:
        """Returns the verdict, empty if no rank is lost, and whether this rank has spoken it."""
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
            self._check_in.announce(self._sentence(who, alarm) if who else "")
        return self._check_in.verdict(until + _ANSWER - time.monotonic()), speaks

    def _who(self, alarm: Alarm) -> str:
        if missing := self._check_in.missing():
            return f"{self._check_in.names(missing)} {'were' if len(missing) > 1 else 'was'} lost"
        if alarm.kind == "suspected":
            return ""
        if late := self._check_in.late():
            return f"{self._check_in.names(late)} kept the others waiting for too long"
        return "all ranks lost their connections"

    def _sentence(self, who: str, alarm: Alarm) -> str:
        when = "while the ranks started" if self._step is None else f"in step {self._step + 1}"
        if self._step == self._steps:
            when = "after the last step"
        return f"{who} {when} ({alarm.reason})"

    # Step 5: all end.

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
            self._note_end(self._ending.state, self._ending.reason)

    def _cause(self) -> BaseException:
        assert self._ending is not None
        if self._ending.kind == "diverged":
            return OtherRankError(self._ending.reason)
        if self._ending.kind == "mendable":
            return OtherRankError(f"another rank ended with {self._ending.reason}")
        return (AskedToStop if self._ending.kind == "stopped" else LostRankError)(self._ending.reason)

    # Step 6: the store is lost.

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
            self._end(replace(alarm, reason=self._sentence(f"{self._first} was lost", alarm)), speaks=True)
        self._decided.set()
