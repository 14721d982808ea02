"""What can be exported is known from the config, and said before a training begins."""

from __future__ import annotations

from typing import Any

import pytest

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import ModelSize
from moe_testbed.launcher.export.conditions import refusal
from moe_testbed.launcher.train.summary import announcement
from tests.distributed import corpus
from tests.export import cases

MIX = {"name": "x", "vocab_size": 512, "domains": {"a": {"sources": [{"kind": "files", "glob": "*"}]}}}


def config_of(parts: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate(corpus.make_experiment({"mix": MIX, "sequence_length": 16}, **parts))


@pytest.mark.parametrize("name", ["expert_choice", "reference", "random", "top_p", "cosine", "quantile", "sinkhorn"])
def test_other_routers_are_refused(name: str) -> None:
    said = refusal(config_of(cases.with_routing(cases.ENCODER, {"name": name})))
    assert said is not None and f"this router cannot be exported: routing.router.name is {name}" in said
    # A model without experts has no use for it.
    assert refusal(config_of(cases.dense(cases.with_routing(cases.ENCODER, {"name": name})))) is None


@pytest.mark.parametrize("name", ["top_k", "frozen", "noisy_top_k", "top_k_softmax", "sigmoid", "hash"])
def test_these_are_not(name: str) -> None:
    for parts in ({}, cases.ENCODER, cases.BOTH):
        assert refusal(config_of(cases.with_routing(parts, {"name": name}))) is None


def test_what_else_is_refused() -> None:
    top_k = cases.with_routing(cases.ENCODER, {"name": "top_k"})
    for routing, said in (
        ({"unit": "sequence"}, "routing.unit is sequence"),
        ({"input": "domain_embedding"}, "routing.input is domain_embedding, which reads domain labels"),
    ):
        assert said in str(refusal(config_of({**top_k, "routing": {**top_k["routing"], **routing}})))
    free = {**cases.MOE, "num_copy_experts": 1}
    assert "zero-computation experts" in str(refusal(config_of(cases.with_routing({}, {"name": "top_k"}, moe=free))))
    capacity = {**cases.MOE, "dispatch": "capacity"}
    assert "dispatch is capacity" in str(refusal(config_of(cases.with_routing({}, {"name": "top_k"}, moe=capacity))))


def test_the_encoders_routing_counts_too() -> None:
    both = cases.with_routing(cases.BOTH, {"name": "top_k"})
    encoder = {"router": {"name": "expert_choice"}, "balance": "none"}
    config = config_of({**both, "routing": {**both["routing"], "encoder": encoder}})
    assert "routing.router.name is expert_choice" in str(refusal(config))


def test_it_is_said_before_the_training() -> None:
    size = ModelSize(1, 1, 1)

    def said(parts: Any) -> str:
        return announcement(config_of(parts), size, 0)

    reference = {"name": "reference"}
    assert "\nthis router cannot be exported: routing.router.name is" in said(
        cases.with_routing(cases.ENCODER, reference)
    )
    assert "cannot be exported" not in said(cases.with_routing({}, reference))
    assert "cannot be exported" not in said(cases.with_routing(cases.ENCODER, {"name": "top_k"}))
