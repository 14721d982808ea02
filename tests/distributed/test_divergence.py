"""Ranks of which one meets numbers that are not finite end together, with one message that names where it began."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train import faults

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]


@pytest.mark.parametrize(
    ("expert_parallel_size", "fault", "name", "words"),
    [
        (
            2,
            "weight",
            "blocks.1.moe.deepspeed_moe.experts.down",
            "blocks.1.moe.deepspeed_moe.experts.down, a weight that is not finite",
        ),
        (1, "gradient", "blocks.1.attention.output.weight", "the gradient of blocks.1.attention.output.weight"),
        (2, "update", "blocks.0.moe.deepspeed_moe.experts.down", "blocks.0.moe.deepspeed_moe.experts.down"),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_one_message(
    expert_parallel_size: int,
    fault: str,
    name: str,
    words: str,
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    config = make_experiment(
        training=make_experiment()["training"] | {"micro_batch_size": 4},
        parallel={"expert_parallel_size": expert_parallel_size},
        checkpoint={"every": 1},
    )
    first, second = run_on_ranks(faults.train, 2, config, str(tmp_path / "run"), fault, name, [3], [1])
    assert first == second and f"; it began in {words}" in first
    status = json.loads((tmp_path / "run" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"], status["reason"]) == ("diverged", 3, first)
