"""Experts in an encoder and in a decoder: what is recorded of each stack, and what remains of the encoder's routing
when a model starts from it and frees it partway.

Shape legend: Y MoE layers, T tokens of the probe, W places for choices, D domains, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe_testbed.routing.metrics import COUNTS, REPORTED
from tests.train.stacks import evaluate, tokens_naively

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

STEPS = 8
ROUTINGS = {
    "reference": {"router": {"name": "reference"}, "balance": "none"},
    "top_k": {"router": {"name": "top_k"}, "balance": {"load_balancing_loss": {"scope": "global_batch"}}},
}
TRACKED = [metric for metric in REPORTED if metric.tracked and metric.of == COUNTS]


@pytest.fixture(scope="module")
def make_stage(make_experiment: MakeExperiment) -> MakeExperiment:
    """The config of an encoder, or of an encoder-decoder model, with two layers of experts in each stack."""

    def make(architecture: str, router: str, **parts: Any) -> dict[str, Any]:
        base = make_experiment()
        return make_experiment(
            **{
                "model": base["model"] | {"architecture": architecture},
                "objective": {"name": {"encoder": "masked", "encoder_decoder": "denoising"}[architecture]},
                "training": base["training"] | {"steps": STEPS, "learning_rate": 0.05},
                "routing": ROUTINGS[router],
                "probe": {"points": STEPS, "sequences_per_domain": 2},
                **parts,
            }
        )

    return make


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize("router", list(ROUTINGS))
def test_counts_of_each_stack_equal_loops_over_tokens(
    router: str, architecture: str, make_stage: MakeExperiment, run_on_ranks: Run
) -> None:
    config = make_stage(architecture, router)
    ((arrays, values),) = run_on_ranks(evaluate, 1, config)
    (tokens,) = run_on_ranks(tokens_naively, 1, config)
    stacks = ["encoder", "decoder"] if architecture == "encoder_decoder" else ["encoder"]
    places = [(stack, layer) for stack in stacks for layer in (0, 1)]
    assert len(arrays["counts_top_k_YDE"]) == len(places)
    for y, place in enumerate(places):
        routed_D, counts_DE = np.zeros(3, dtype=int), np.zeros((3, 8), dtype=int)
        for (*of_place, domain, experts), number in tokens.items():
            if tuple(of_place) == place:
                routed_D[domain] += number
                for expert in experts:
                    counts_DE[domain, expert] += number
        assert arrays["routed_tokens_YD"][y].tolist() == routed_D.tolist()
        assert arrays["counts_top_k_YDE"][y].tolist() == counts_DE.tolist()
    # Deletion shortens what the encoder reads; of masked tokens only some are to be predicted.
    assert (arrays["routed_tokens_YD"][0] != arrays["tokens_D"]).all()
    for stack in stacks:
        of_stack = [y for y, (name, _) in enumerate(places) if name == stack]
        for metric in TRACKED:
            assert metric.function is not None
            expected = np.mean([metric.function(arrays["counts_top_k_YDE"][y]) for y in of_stack])
            assert values[f"{stack}/{metric.name}"] == pytest.approx(expected), metric.name
    assert any(key.startswith("decoder/") for key in values) == (architecture == "encoder_decoder")
