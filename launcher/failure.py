"""Why ranks fail together: the one that cannot go on tells the others, which only see its connections close."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch.distributed as dist

from moe_testbed.launcher.errors import MENDABLE
from moe_testbed.launcher.ranks import Ranks

_REASON = "moe_testbed/reason"
_HEARD = "moe_testbed/heard"
_PATIENCE_SECONDS = 5.0


def reason_of(error: BaseException) -> str:
    """One line for the run's status."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Failure:
    """The place where a rank leaves why it ends, if it is for what a user can mend: the store by which ranks met.

    The process that keeps the store may be gone; whoever asks then hears nothing.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._store: Any = dist.distributed_c10d._get_default_store() if ranks.size > 1 else None

    def tell(self, error: BaseException) -> None:
        """Leaves the reason. To be called before this rank's connections close, which is what the others notice."""
        if self._store is not None and isinstance(error, MENDABLE):
            with contextlib.suppress(RuntimeError):
                self._store.set(_REASON, reason_of(error))

    def told(self) -> str | None:
        """The reason that a rank has left, this one included; None without one."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                if self._store.check([_REASON]):
                    reason: str = self._store.get(_REASON).decode()
                    self._store.add(_HEARD, 1)
                    return reason
        return None

    def wait_until_heard(self) -> None:
        """Keeps the store of rank 0 alive until the others have asked, or for a few seconds. To be called after the
        connections have closed."""
        if self._store is not None and self._ranks.rank == 0:
            deadline = time.monotonic() + _PATIENCE_SECONDS
            with contextlib.suppress(RuntimeError):
                while self._store.add(_HEARD, 0) < self._ranks.size and time.monotonic() < deadline:
                    time.sleep(0.02)
