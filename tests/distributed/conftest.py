"""Ranks and data that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.distributed import corpus
from tests.processes import ranks


@pytest.fixture(scope="session")
def run_on_ranks() -> Callable[..., list[Any]]:
    """``run_on_ranks(function, num_ranks, *arguments)`` -> what it returned on each rank."""
    return ranks.run_on_ranks


@pytest.fixture(scope="session")
def run_until_killed() -> Callable[..., None]:
    """``run_until_killed(function, num_ranks, *arguments)``: at least one rank must die by SIGKILL, none may finish."""
    return ranks.run_until_killed


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``data`` part of an experiment's config, its token store built."""
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def make_experiment(data: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """An experiment's config; every keyword argument updates the part of that name."""

    def make(**parts: Any) -> dict[str, Any]:
        return corpus.make_experiment(data, **parts)

    return make
