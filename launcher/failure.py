"""Why ranks fail together: the one that cannot go on tells the others, which only see its connections close."""

from __future__ import annotations

import contextlib
from typing import Any

import torch.distributed as dist

from moe_testbed.launcher.errors import MENDABLE

_KEY = "moe_testbed/failure"


def reason_of(error: BaseException) -> str:
    """One line for the run's status."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def tell_ranks(error: BaseException) -> None:
    """Leaves the reason where the other ranks find it, if it is one that a user can mend.

    To be called before this rank's connections close.
    """
    if isinstance(error, MENDABLE) and dist.get_world_size() > 1:
        # The process that keeps the store may be gone; then nobody is left to read it.
        with contextlib.suppress(RuntimeError):
            _store().set(_KEY, reason_of(error))


def told_by_ranks() -> str | None:
    """The reason that a rank has left; None without one."""
    if dist.get_world_size() > 1:
        with contextlib.suppress(RuntimeError):
            if _store().check([_KEY]):
                return str(_store().get(_KEY).decode())
    return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
