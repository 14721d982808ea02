"""A suite whose runs are trained by a stub."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.config.suite import Suite, load_suite

Write = Callable[[str, str], Path]
MakeSuite = Callable[..., Suite]


@pytest.fixture
def stub_command() -> list[str]:
    """What trains a run instead of `moe-testbed train`."""
    return [sys.executable, str(Path(__file__).with_name("stub_train.py"))]


@pytest.fixture
def make_suite(experiment: Path, write: Write) -> MakeSuite:
    """A suite, in a fresh working directory, of runs that behave as their labels say; see stub_train.py."""

    def make(*labels: str) -> Suite:
        runs = "\n".join(f"  {label}: {{}}" for label in labels)
        write("stubs.yaml", f"name: stubs\nexperiment: small.yaml\nruns:\n{runs}\n")
        return load_suite("stubs.yaml")

    return make
