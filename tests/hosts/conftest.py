"""Hosts for the tests that need several."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.distributed.conftest import data, make_experiment, run_on_ranks
from tests.hosts.network import Network, missing

__all__ = ["data", "four_hosts", "make_experiment", "run_on_ranks", "two_hosts"]


@pytest.fixture
def two_hosts() -> Iterator[Network]:
    """Fresh ones. Without what they need the test is skipped, or fails if MOE_TESTBED_REQUIRE_DAEMONS is set."""
    yield from _hosts(2)


@pytest.fixture
def four_hosts() -> Iterator[Network]:
    """As ``two_hosts``."""
    yield from _hosts(4)


def _hosts(number: int) -> Iterator[Network]:
    if lacking := missing():
        message = f"hosts of network namespaces need {lacking}"
        if os.environ.get("MOE_TESTBED_REQUIRE_DAEMONS"):
            pytest.fail(message)
        pytest.skip(message)
    with Network(number) as network:
        yield network
