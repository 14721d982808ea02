"""Why ranks fail together: the one that cannot go on tells the others, which only see its connections close."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_testbed.launcher.errors import MENDABLE
from moe_testbed.launcher.files import read_json
from moe_testbed.launcher.ranks import Ranks

_KEY = "moe_testbed/failure"


def reason_of(error: BaseException) -> str:
    """One line for the run's status."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Failure:
    """Where a rank leaves why it ends, if it is for what a user can mend.

    That is the store by which the ranks have met, since rank 0 may write a step's status over a reason in the run's
    folder. Where rank 0 keeps the store itself, it takes it along; its reason is the status that it writes last.

    Args:
        ranks: that have joined.
        run_dir: folder of the run.
    """

    def __init__(self, ranks: Ranks, run_dir: Path) -> None:
        self._store: Any = dist.distributed_c10d._get_default_store() if ranks.size > 1 else None
        self._status = run_dir / "status.json"
        self._written_before = self._time_of_status()

    def tell(self, error: BaseException) -> None:
        """Leaves the reason. To be called before this rank's connections close, which is what the others notice."""
        if self._store is not None and isinstance(error, MENDABLE):
            with contextlib.suppress(RuntimeError):
                self._store.set(_KEY, reason_of(error))

    def told(self) -> str | None:
        """The reason that a rank has left, this one included; None without one."""
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            return str(self._store.get(_KEY).decode()) if self._store.check([_KEY]) else None
        status = read_json(self._status)
        is_news = status.get("state") == "failed" and self._time_of_status() != self._written_before
        return status["reason"] if is_news else None

    def _time_of_status(self) -> int:
        return self._status.stat().st_mtime_ns if self._status.exists() else 0
