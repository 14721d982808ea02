"""Builds the data of a suite before its trainings start."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.config.suite import SuiteRun


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
