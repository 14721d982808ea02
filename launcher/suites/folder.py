"""What comes before the runs of a suite, however they are started."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.errors import ConfigError


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a suite's folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another process holds it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ConfigError(
            f"{folder} is being compared or submitted by another process; wait for it, or choose another --runs-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def build_stores(runs: Sequence[SuiteRun]) -> None:
    """Builds the data once, before several trainings would wait for it. Raises DataError if it cannot be built."""
    from moe_testbed.data.build import build_store, store_path

    built = set()
    for run in runs:
        data = run.config.data
        path = store_path(data.mix, Path(data.cache_dir))
        if path not in built:
            build_store(data.mix, Path(data.cache_dir), lambda text: print(text, file=sys.stderr))
            built.add(path)
