"""What ranks say to one another through the key-value store by which they have met: heartbeats, alarms, check-ins.

A rank that dies closes its connections, and one that hangs or is cut off lets the others' collectives run out of time.
Either way the others see an error of the transport, which names an address at best. The store lets them find out which
rank is lost: `watchdog` has the protocol, this module its messages.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

from moe_testbed.launcher.errors import MENDABLE, AskedToStop, DivergedError

_TRANSPORT = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket", re.IGNORECASE)


def host_name() -> str:
    """Returns the name of this machine, or of the node where SLURM simulates several on one machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def reason_of(error: BaseException) -> str:
    """Returns one line about an error for the run's status."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_of_transport(error: BaseException) -> bool:
    """Tells whether an error is about a connection to other ranks, and so about a failure of theirs. Backends raise
    plain RuntimeErrors too."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_TRANSPORT.search(str(error)))
    )


def symptom_of(error: BaseException) -> str:
    """Returns the first sentence of an error of the transport, without the place in the source before it."""
    first = re.sub(r"^(\[[^]]*\]\s*)+", "", str(error).strip()).partition("\n")[0]
    return first.partition(". ")[0][:200]


@dataclass(frozen=True)
class Alarm:
    """Why a rank cannot go on.

    Attributes:
        kind: transport if it has lost another rank; suspected if it may have; mendable if the user can mend what is
            wrong; diverged if a loss is not finite; stopped if it was asked to stop; failed for any other error.
        rank: the rank that raises the alarm.
        reason: one line.
    """

    kind: Literal["transport", "suspected", "mendable", "diverged", "stopped", "failed"]
    rank: int
    reason: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Alarm:
        """Returns the alarm of a rank that has met an error."""
        if isinstance(error, AskedToStop):
            return cls("stopped", rank, str(error))
        if isinstance(error, DivergedError):
            return cls("diverged", rank, str(error))
        if isinstance(error, MENDABLE):
            return cls("mendable", rank, reason_of(error))
        if is_of_transport(error):
            return cls("transport", rank, symptom_of(error))
        return cls("failed", rank, reason_of(error))

    @property
    def state(self) -> str:
        """The state of the run that ends by this alarm."""
        return self.kind if self.kind in ("stopped", "diverged") else "failed"


class CheckIn:
    """Writes what this rank says to the store, and reads what the others have said.

    Every method raises RuntimeError, or never returns, if the store cannot be reached.

    Args:
        store: the store of the process group. This object makes a connection of its own, since other threads may wait
            in theirs.
        rank, size: number of this rank, number of ranks.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store: Any = dist.PrefixStore("moe_testbed", store.clone())  # type: ignore[attr-defined]
        self._rank, self._size, self._round = rank, size, 0
        self._hosts: dict[int, str] = {}
        self._store.set(f"host/{rank}", host_name())

    def beat(self) -> int:
        """Gives a sign of life.

        Returns:
            How many signs the next rank has given. Rank 0 comes after the last one, so that each rank is watched by
            another.
        """
        self._store.add(f"beat/{self._rank}", 1)
        return int(self._store.add(f"beat/{(self._rank + 1) % self._size}", 0))

    def begin_anew(self) -> None:
        """Forgets an alarm that was false; every rank that has checked in does so."""
        self._round += 1

    def sound(self, alarm: Alarm) -> None:
        """Sounds an alarm to all ranks, unless another one has been sounded: the first one counts."""
        self._store.compare_set(self._key("alarm"), "", json.dumps(asdict(alarm)))

    def heard(self) -> Alarm | None:
        """Returns the alarm that has been sounded; None if there was none."""
        key = self._key("alarm")
        return Alarm(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def present(self) -> None:
        """Says that this rank is alive."""
        self._store.set(self._key(f"present/{self._rank}"), "")

    def waited(self) -> None:
        """Says that this rank has met an error of the transport, and so has come to the collective that failed."""
        self._store.set(self._key(f"waited/{self._rank}"), "")

    def missing(self) -> list[int]:
        """Returns the ranks that have not said that they are alive."""
        return self._without(self._key("present"))

    def wait_for_all(self, seconds: float) -> None:
        """Waits until all ranks have said that they are alive, but no longer than this."""
        keys, deadline = [self._key(f"present/{rank}") for rank in range(self._size)], time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)

    def late(self) -> list[int]:
        """Returns the ranks that have not said that they have waited."""
        return self._without(self._key("waited"))

    def speaks(self) -> bool:
        """Tells whether this rank is the first to ask for it, and so speaks for all: it finds out who is lost."""
        me = str(self._rank)
        return bool(self._store.compare_set(self._key("speaker"), "", me) == me.encode())

    def announce(self, verdict: str) -> None:
        """Announces the verdict to all ranks; an empty one says that the alarm was false."""
        self._store.set(self._key("verdict"), verdict)

    def verdict(self, seconds: float) -> str:
        """Returns the verdict. Raises TimeoutError if it is not announced within this time."""
        key, deadline = self._key("verdict"), time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no verdict was announced within {seconds:g} s")
            time.sleep(0.05)
        return str(self._store.get(key).decode())

    def leave(self) -> None:
        """Says that this rank does not need the store any more."""
        self._store.set(f"left/{self._rank}", "")

    def wait_for_others(self, lost: list[int], seconds: float) -> None:
        """Waits until all ranks but the lost ones have left, but no longer than this: the process that keeps the store
        takes it along when it ends."""
        deadline = time.monotonic() + seconds
        while set(self._without("left")) - set(lost) and time.monotonic() < deadline:
            time.sleep(0.05)

    def names(self, ranks: Iterable[int]) -> str:
        """Returns for instance "rank 3 on host node2", or "rank 3" if it was lost before it said where it is."""
        return ", ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        if rank not in self._hosts and self._store.check([f"host/{rank}"]):
            self._hosts[rank] = self._store.get(f"host/{rank}").decode()
        return f"rank {rank} on host {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"

    def _without(self, kind: str) -> list[int]:
        return [rank for rank in range(self._size) if not self._store.check([f"{kind}/{rank}"])]
