"""Who is missing when ranks cannot go on together.

A rank that dies closes its connections, and one that hangs or is cut off lets the others' collectives run out of time:
either way the others see an error of the transport, which names an address at best. So they check in with the store by
which the ranks have met. Who does not is lost. They also give signs of life all the time, since some backends tell
nothing, and a suspicion makes them check in too.
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

from moe_testbed.launcher.errors import MENDABLE, AskedToStop

_TRANSPORT = re.compile(r"gloo|nccl|connection (closed|reset|refused)|socket", re.IGNORECASE)


def host_name() -> str:
    """Of this machine; of the node, where SLURM simulates several on one machine."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def reason_of(error: BaseException) -> str:
    """One line for the run's status."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def is_of_transport(error: BaseException) -> bool:
    """The error tells of a connection to other ranks, and so of a failure of theirs. Backends raise plain
    RuntimeErrors too."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and bool(_TRANSPORT.search(str(error)))
    )


def symptom_of(error: BaseException) -> str:
    """What an error of the transport says in its first sentence, without the place in the source before it."""
    first = re.sub(r"^(\[[^]]*\]\s*)+", "", str(error).strip()).partition("\n")[0]
    return first.partition(". ")[0][:200]


@dataclass(frozen=True)
class Alarm:
    """Why a rank cannot go on.

    Attributes:
        kind: transport: it has lost another one; suspected: it may have; mendable: by the user; stopped: it was asked
            to; failed: the rest.
        rank: that was the first to say so.
        reason: one line.
    """

    kind: Literal["transport", "suspected", "mendable", "stopped", "failed"]
    rank: int
    reason: str

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Alarm:
        """The alarm of a rank that has met an error."""
        if isinstance(error, AskedToStop):
            return cls("stopped", rank, str(error))
        if isinstance(error, MENDABLE):
            return cls("mendable", rank, reason_of(error))
        if is_of_transport(error):
            return cls("transport", rank, symptom_of(error))
        return cls("failed", rank, reason_of(error))

    @property
    def state(self) -> str:
        """Of the run."""
        return "stopped" if self.kind == "stopped" else "failed"


class CheckIn:
    """What ranks tell one another in the store.

    Every method raises RuntimeError, or never returns, if the store cannot be reached.

    Args:
        store: of the process group. A connection of its own is made: others may wait in theirs.
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
            How many the next rank has given; rank 0 comes after the last one, so that each is watched by another.
        """
        self._store.add(f"beat/{self._rank}", 1)
        return int(self._store.add(f"beat/{(self._rank + 1) % self._size}", 0))

    def begin_anew(self) -> None:
        """Forgets an alarm that was a false one; every rank that has checked in does so."""
        self._round += 1

    def sound(self, alarm: Alarm) -> None:
        """Raises an alarm; the first one counts."""
        self._store.compare_set(self._key("alarm"), "", json.dumps(asdict(alarm)))

    def heard(self) -> Alarm | None:
        """The alarm, if there is one."""
        key = self._key("alarm")
        return Alarm(**json.loads(self._store.get(key))) if self._store.check([key]) else None

    def present(self) -> None:
        """Says that this rank is alive."""
        self._store.set(self._key(f"present/{self._rank}"), "")

    def waited(self) -> None:
        """Says that this rank has met an error of the transport, and so has come to the collective that failed."""
        self._store.set(self._key(f"waited/{self._rank}"), "")

    def missing(self) -> list[int]:
        """Ranks that have not said that they are alive."""
        return self._without(self._key("present"))

    def wait_for_all(self, seconds: float) -> None:
        """Waits until all have said that they are alive, no longer than this."""
        keys, deadline = [self._key(f"present/{rank}") for rank in range(self._size)], time.monotonic() + seconds
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)

    def late(self) -> list[int]:
        """Ranks that have not said that they have waited."""
        return self._without(self._key("waited"))

    def speaks(self) -> bool:
        """This rank is the one that finds out who is lost, and tells it."""
        me = str(self._rank)
        return bool(self._store.compare_set(self._key("speaker"), "", me) == me.encode())

    def tell(self, verdict: str) -> None:
        """Tells all ranks; an empty verdict is that the alarm was a false one."""
        self._store.set(self._key("verdict"), verdict)

    def told(self, seconds: float) -> str:
        """What the rank that speaks has told. Raises TimeoutError if it has not within this time."""
        key, deadline = self._key("verdict"), time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no verdict was told within {seconds:g} s")
            time.sleep(0.05)
        return str(self._store.get(key).decode())

    def leave(self) -> None:
        """Says that this rank needs the store no more."""
        self._store.set(f"left/{self._rank}", "")

    def wait_for_others(self, lost: list[int], seconds: float) -> None:
        """Waits until all ranks but the lost ones have left, no longer than this: the process that keeps the store
        takes it along."""
        deadline = time.monotonic() + seconds
        while set(self._without("left")) - set(lost) and time.monotonic() < deadline:
            time.sleep(0.05)

    def names(self, ranks: Iterable[int]) -> str:
        """For instance "rank 3 on host node2", or "rank 3" if it was lost before it said where it is."""
        return ", ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        if rank not in self._hosts and self._store.check([f"host/{rank}"]):
            self._hosts[rank] = self._store.get(f"host/{rank}").decode()
        return f"rank {rank} on host {self._hosts[rank]}" if rank in self._hosts else f"rank {rank}"

    def _key(self, name: str) -> str:
        return f"{self._round}/{name}"

    def _without(self, kind: str) -> list[int]:
        return [rank for rank in range(self._size) if not self._store.check([f"{kind}/{rank}"])]
