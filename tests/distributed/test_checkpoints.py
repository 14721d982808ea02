"""Checkpoints of experts on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training import driver
from tests.training.results import assert_same_run

MakeExperiment = Callable[..., dict[str, Any]]


@pytest.fixture
def make_two_rank_experiment(make_experiment: MakeExperiment) -> MakeExperiment:
    """Two checkpoints before the end; the keyword is the expert-parallel size."""

    def make(expert_parallel_size: int) -> dict[str, Any]:
        return make_experiment(
            training=make_experiment()["training"] | {"micro_batch_size": 4},
            parallel={"expert_parallel_size": expert_parallel_size},
            checkpoint={"every": 2},
        )

    return make


@pytest.mark.parametrize(
    ("where", "number"), [("before a step", 4), ("inside a checkpoint's file", 6), ("before a checkpoint is marked", 2)]
)
def test_two_ranks_killed_continue_exactly(
    where: str,
    number: int,
    make_two_rank_experiment: MakeExperiment,
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    config = make_two_rank_experiment(2)
    run_on_ranks(driver.train, 2, config, str(tmp_path / "whole"))
    run_until_killed(driver.train_and_die, 2, config, str(tmp_path / "killed"), where, number)
    run_on_ranks(driver.train, 2, config, str(tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_another_number_of_ranks_is_refused(
    make_two_rank_experiment: MakeExperiment,
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    config, run_dir = make_two_rank_experiment(1), str(tmp_path / "run")
    run_until_killed(driver.train_and_die, 2, config, run_dir, "before a step", 4)
    with pytest.raises(
        AssertionError,
        match=r"CheckpointError: .*step_00000002: written with 2 ranks and expert_parallel_size 1, but this run has "
        r"1 ranks and expert_parallel_size 1; start it with the same layout",
    ):
        run_on_ranks(driver.train, 1, config, run_dir)
    with pytest.raises(AssertionError, match=r"ConfigError: .* holds a run that differs in parallel"):
        run_on_ranks(driver.train, 2, make_two_rank_experiment(2), run_dir)
    # Neither refusal has harmed the run.
    run_on_ranks(driver.train, 2, config, run_dir)
