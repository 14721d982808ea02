"""Zero, copy and constant experts beside those with a feed-forward layer, against loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.zero_computation import ZeroComputation
from moe_testbed.routing.records import NO_EXPERT, RoutingContext
from tests.model.naive_moe import (
    DISPATCHES,
    Dispatch,
    E,
    M,
    T,
    assert_equals_a_loop,
    decision_of,
    make_layer,
    naive_kept,
    random_decision,
)

every_dispatch = pytest.mark.parametrize("dispatch", DISPATCHES)
FORMS = [
    {"num_zero_experts": 2},
    {"num_copy_experts": 1},
    {"num_constant_experts": 1},
    {"num_zero_experts": 1, "num_copy_experts": 2, "num_constant_experts": 3},
]
ALL = FORMS[-1]


@every_dispatch
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@pytest.mark.parametrize(("width", "unused_share"), [(1, 0.0), (2, 0.0), (4, 0.3)])
def test_outputs_and_gradients_equal_a_loop(
    dispatch: Dispatch, form: dict[str, int], width: int, unused_share: float
) -> None:
    decision = random_decision(width, unused_share, num_experts=E + sum(form.values()))
    layer = make_layer(dispatch, 2, capacity_factor=4 * E, **form)
    assert_equals_a_loop(layer, decision, decision.expert_ids_TK != NO_EXPERT)


@every_dispatch
def test_no_token_needs_to_choose_a_feed_forward_layer(dispatch: Dispatch) -> None:
    layer, ids_TK = make_layer(dispatch, 2, **ALL), torch.randint(E, E + 6, (T, 2))
    ids_TK[3] = NO_EXPERT
    assert_equals_a_loop(layer, decision_of(ids_TK), ids_TK != NO_EXPERT)


@pytest.mark.parametrize("capacity_factor", [0.1, 0.5, 1.0])
def test_a_capacity_drops_feed_forward_assignments_only(capacity_factor: float) -> None:
    decision = random_decision(3, 0.2, preferred=1, num_experts=E + 6)
    kept_TK = naive_kept(decision.expert_ids_TK, max(1, math.ceil(capacity_factor * 2 * T / (E + 6))))
    assert_equals_a_loop(make_layer("capacity", 2, capacity_factor, **ALL), decision, kept_TK)


def test_kept_outputs_are_the_summands() -> None:
    decision = random_decision(3, 0.3, num_experts=E + 6)
    layer = make_layer("dropless", 2, keep_outputs=True, **ALL)
    assert_equals_a_loop(layer, decision, decision.expert_ids_TK != NO_EXPERT)


def test_constant_experts_start_halfway_and_learn() -> None:
    experts, x_TM = ZeroComputation(M, 0, 0, 1), torch.randn(T, M)
    output_TM = experts(x_TM, torch.ones(T, 1))
    torch.testing.assert_close(output_TM, x_TM / 2)
    (output_TM * torch.randn(T, M)).sum().backward()
    assert all(bool(p.grad.ne(0).all()) for p in experts.parameters() if p.grad is not None)
    assert len([p for p in experts.parameters() if p.grad is not None]) == 2


@every_dispatch
def test_a_model_routes_to_all_forms(
    dispatch: Dispatch,
    make_model: Callable[..., LanguageModel],
    make_batch: Callable[..., tuple[RoutingContext, Tensor]],
) -> None:
    model = make_model(moe={"dispatch": dispatch, **ALL})
    output = model(*make_batch())
    output.loss.backward()
    first = model.config.moe.num_ffn_experts
    for layer in output.layers:
        free_TK = layer.decision.expert_ids_TK >= first
        assert bool(free_TK.any()) and bool(layer.kept_TK[free_TK].all())
    assert all(p.grad is not None for name, p in model.named_parameters() if "zero_computation" in name)
    probabilities_TE = output.layers[0].decision.probabilities_TE
    assert probabilities_TE is not None and probabilities_TE.shape[1] == first + 6
