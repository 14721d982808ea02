"""Gradients are added up over micro-batches in float32, also where the model computes in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.train import accumulated

Run = Callable[..., list[Any]]


def error(of_ranks: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> float:
    """Norm of the difference, relative to that of the gradient."""
    squares = torch.zeros(2, dtype=torch.float64)
    for name, gradient in expected.items():
        parts = of_ranks if ".experts." in name else of_ranks[:1]
        found = torch.cat([rank[name] for rank in parts]).double()
        squares += torch.stack([(found - gradient).square().sum(), gradient.double().square().sum()])
    return float((squares[0] / squares[1]).sqrt())


@pytest.fixture(scope="module")
def make_config(make_experiment: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``make_config(micro_batch_size, ranks, zero_stage)``: 32 sequences a step in bfloat16, their experts chosen by a
    hash router, which decides alike in every precision."""

    def make(micro_batch_size: int, ranks: int = 1, zero_stage: int = 1) -> dict[str, Any]:
        training = {"zero_stage": zero_stage, "precision": "bfloat16", "micro_batch_size": micro_batch_size}
        return make_experiment(
            routing={"router": {"name": "hash"}, "balance": {}},
            training=training | {"global_batch_size": 32, "gradient_clipping": 0.0, "warmup_steps": 0},
            parallel={"expert_parallel_size": ranks},
        )

    return make


@pytest.fixture(scope="module")
def expected(make_config: Callable[..., dict[str, Any]], run_on_ranks: Run) -> dict[str, Tensor]:
    """The gradient in float32, by autograd alone."""
    (gradient,) = run_on_ranks(accumulated.by_autograd, 1, make_config(32))
    return gradient  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def error_at_once(make_config: Callable[..., dict[str, Any]], expected: dict[str, Tensor], run_on_ranks: Run) -> float:
    """Of one micro-batch."""
    return error(run_on_ranks(accumulated.by_the_engine, 1, make_config(32)), expected)


@pytest.mark.parametrize(("ranks", "zero_stage"), [(1, 1), (2, 1), (2, 2)])
def test_many_micro_batches_round_no_more_than_one(
    ranks: int,
    zero_stage: int,
    make_config: Callable[..., dict[str, Any]],
    expected: dict[str, Tensor],
    error_at_once: float,
    run_on_ranks: Run,
) -> None:
    """Seen: .0111 with one micro-batch, .0111 to .0113 with 32 or twice 16, and .0120 to .0127 where DeepSpeed adds up
    in bfloat16."""
    in_parts = error(run_on_ranks(accumulated.by_the_engine, ranks, make_config(1, ranks, zero_stage)), expected)
    assert 0 < in_parts < 1.04 * error_at_once
