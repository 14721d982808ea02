"""An expert that gets no token still moves: by weight decay, and by the momentum of earlier gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train import dead_expert, driver

RATE, DECAY, BETAS, EPSILON = 0.01, 0.1, (0.9, 0.95), 1e-8


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_an_expert_without_tokens_moves_as_adamw_does_with_a_gradient_of_0(
    zero_stage: int, make_experiment: Callable[..., dict[str, Any]], run_on_ranks: Callable[..., list[Any]]
) -> None:
    """The oracle is AdamW by hand (arXiv 1711.05101, algorithm 2)."""
    training = {"steps": 4, "warmup_steps": 0, "gradient_clipping": 0.0, "learning_rate": RATE, "weight_decay": DECAY}
    config = make_experiment(
        routing={"router": {"name": f"{Path(dead_expert.__file__)}:UsesItOnce"}, "balance": {}},
        training=training | {"betas": list(BETAS), "zero_stage": zero_stage},
    )
    ((gradient, weights, tokens),) = run_on_ranks(dead_expert.train, 1, config)
    assert tokens[0] > 0 and tokens[1:] == [0, 0, 0] and gradient.any()
    expected = weights[0].double()
    first = second = torch.zeros_like(expected)
    for step, after in enumerate(weights[1:], start=1):
        now = gradient.double() if step == 1 else torch.zeros_like(expected)
        first = BETAS[0] * first + (1 - BETAS[0]) * now
        second = BETAS[1] * second + (1 - BETAS[1]) * now**2
        moved = (first / (1 - BETAS[0] ** step)) / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
        expected = expected - RATE * (moved + DECAY * expected)
        torch.testing.assert_close(after.double(), expected, rtol=1e-4, atol=1e-6)
        assert not torch.equal(after, weights[step - 1])


def test_denormal_moments_are_zero_in_all_threads_of_a_training(
    make_experiment: Callable[..., dict[str, Any]], run_on_ranks: Callable[..., list[Any]], tmp_path: Path
) -> None:
    """Without a gradient Adam's moments decay to such numbers, which are slow, and stay there."""
    config = make_experiment(runtime={"device": "cpu", "threads": 2})
    normal, denormal = 2e-38, 1e-41
    for value, count in ((normal, 1_000_000), (denormal, 0)):
        arguments = config, str(tmp_path / str(value)), value, 1_000_000
        assert run_on_ranks(driver.multiply_instead, 1, *arguments) == [(2, count)]
