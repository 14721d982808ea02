"""One training among its ranks, from its first moment to its last."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import AskedToStop
from moe_testbed.launcher.ranks.heartbeat import reason_of
from moe_testbed.launcher.ranks.lifeline import end_with_launch
from moe_testbed.launcher.ranks.preemption import StopSignals, end_before_rendezvous
from moe_testbed.launcher.ranks.ranks import Ranks, is_alone, mean_over_ranks
from moe_testbed.launcher.ranks.rendezvous import join
from moe_testbed.launcher.ranks.watchdog import Watchdog
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status


class Session:
    """Owns what a training shares with its other ranks, with whoever started it and with whoever looks at its status.

    A training passes through it in this order:

    1. On entering, the process hears the signals that ask it to stop (`preemption`), and ends when the `launch` that
       started it does (`lifeline`).
    2. `join` notes that the run is running, meets the other ranks (`rendezvous`) and sets the watchdog on them
       (`watchdog`).
    3. `watched` lets no error of a rank go unnoticed by the others, and notes in the status how the run ends.
    4. `steps` defers a request to stop to the end of a step, where `after_step` lets the ranks agree on it and
       `stop_if_asked` ends all of them.
    5. On leaving, the ranks part.

    Raises:
        ConfigError: on entering, if `launch` cannot be reached.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._parallel, self._num_steps = config.parallel, config.training.steps
        self._signals = StopSignals(before_exit=self._before_exit, is_request=self._is_request)
        self._exits = ExitStack()
        self._folder: RunFolder | None = None
        self._ranks: Ranks | None = None
        self._watchdog: Watchdog | None = None
        self._step = 0
        self._asked: signal.Signals | None = None

    def __enter__(self) -> Session:
        with ExitStack() as exits:
            exits.enter_context(self._signals)
            end_with_launch()
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._exits.__exit__(kind, error, at)

    @property
    def ranks(self) -> Ranks:
        """The ranks that have met."""
        assert self._ranks is not None, "the ranks have not met"
        return self._ranks

    @property
    def watchdog(self) -> Watchdog:
        """The watchdog over the ranks that have met."""
        assert self._watchdog is not None, "the ranks have not met"
        return self._watchdog

    def join(self, device: torch.device, folder: RunFolder) -> None:
        """Meets the other ranks.

        Args:
            folder: the run's folder; on ranks other than the first, one that writes nothing.

        Raises:
            ConfigError, RuntimeError: as `rendezvous.join`.
        """
        folder.write_status(Status("running", folder.read_status().step, self._num_steps))
        self._folder = folder
        try:
            self._ranks = join(device, self._parallel.slow_timeout_seconds)
        except Exception as error:
            folder.note_end("failed", reason_of(error))
            raise
        self._exits.callback(dist.destroy_process_group)
        # Any rank may be the one that speaks for all, and then notes why they end.
        note_end = RunFolder(folder.path).note_end
        self._watchdog = Watchdog(self._ranks, self._parallel, self._num_steps, note_end)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Makes an error in this context known to the other ranks and to the status, and otherwise notes that the run
        is finished.

        Raises:
            OtherRankError, LostRankError, AskedToStop: instead of an error of the transport, what has happened to
                another rank.
        """
        assert self._folder is not None
        try:
            yield
            self._folder.write_status(Status("finished", self._num_steps, self._num_steps))
            self.watchdog.close()
        except BaseException as error:
            cause = self.watchdog.explain(error)
            raise cause from (None if cause is error else error)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """Defers a request to stop while the steps go on."""
        self._signals.defer()
        yield
        self._signals.end_deferral()

    def after_step(self, done: int, values: dict[str, Tensor]) -> dict[str, float]:
        """Returns the means of a step's values over the ranks, which agree on the way whether they are asked to stop.

        Args:
            done: optimizer steps completed.
            values: tensors without dimensions, with the same keys on all ranks.
        """
        means = mean_over_ranks(values | self._signals.requests(self.ranks), self.ranks)
        self._asked = self._signals.agreed(means, self.ranks)
        self._step = done
        self.watchdog.passed(done)
        return means

    def note_progress(self) -> None:
        """Notes in the status how many steps are completed."""
        assert self._folder is not None
        self._folder.write_status(Status("running", self._step, self._num_steps))

    @property
    def asked_to_stop(self) -> bool:
        """Whether the ranks have agreed that they are asked to stop."""
        return self._asked is not None

    def stop_if_asked(self) -> None:
        """Ends all ranks if they have agreed that they are asked to stop. Raises AskedToStop."""
        if self._asked is None:
            return
        assert self._folder is not None
        reason = f"asked to stop by {self._asked.name} after step {self._step}"
        self._folder.note_end("stopped", reason)
        self.watchdog.close()
        raise AskedToStop(reason)

    @contextmanager
    def slow(self) -> Iterator[None]:
        """Lets the ranks wait longer for one another than they do in a step."""
        with self.watchdog.slow():
            yield

    def say(self, text: str) -> None:
        """Prints to stderr, once for all ranks."""
        if self.ranks.rank == 0:
            print(text, file=sys.stderr)

    def _before_exit(self, stop: AskedToStop) -> None:
        if self._watchdog is not None:
            self._watchdog.explain(stop)
        elif self._folder is not None:
            self._folder.note_end("stopped", str(stop))

    def _is_request(self) -> bool:
        if self._watchdog is not None:
            return self._watchdog.all_alive()
        return is_alone() or end_before_rendezvous()
