"""Which layer decides for which, what a bad decision is answered with, and the routing pass ahead of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.errors import NotFiniteError, RouterError
from moe_testbed.routing.records import RoutingContext, RoutingDecision

MakeModel = Callable[..., LanguageModel]
MakeBatch = Callable[..., tuple[RoutingContext, Tensor]]
LOSS = {"load_balancing_loss": {"coefficient": 0.5, "scope": "global_batch"}}


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_global_depth_all_layers_follow_the_first(
    dispatch: str, checkpointing: bool, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """Against a layer-wise model whose later layers are handed the first one's decision by hand."""
    routing = {"router": {"name": "top_k"}, "depth": "global", "balance": LOSS}
    model = make_model(routing, moe={"dispatch": dispatch}, num_layers=3, activation_checkpointing=checkpointing)
    context, targets_BL = make_batch()
    output = model(context, targets_BL)
    output.loss.backward()
    assert len(model.routers()) == 1 and len(output.layers) == 3
    assert all(layer.decision is output.layers[0].decision for layer in output.layers)

    oracle = make_model({**routing, "depth": "layer_wise"}, moe={"dispatch": dispatch}, num_layers=3)
    first = oracle.blocks[0].routing
    decisions: list[RoutingDecision] = []

    def remember(x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        decisions.append(type(first).forward(first, x_TM, context))
        return decisions[-1]

    first.forward = remember
    for block in list(oracle.blocks)[1:]:
        block.routing.forward = lambda x_TM, context: decisions[-1]
    expected = oracle(context, targets_BL)
    torch.testing.assert_close(output.cross_entropy_BL, expected.cross_entropy_BL)
    torch.testing.assert_close(output.balance["load_balancing_loss"], expected.balance["load_balancing_loss"])
    expected.cross_entropy_BL.mean().backward()
    actual = make_model({**routing, "balance": {}}, moe={"dispatch": dispatch}, num_layers=3)
    actual(context, targets_BL).loss.backward()
    wanted = {name: g for name, g in gradients(oracle).items() if name in gradients(actual)}
    torch.testing.assert_close(gradients(actual), wanted)


def test_with_global_depth_the_loss_counts_one_decision_once(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model({"router": {"name": "top_k"}, "depth": "global", "balance": LOSS}, num_layers=3)
    output = model(*make_batch())
    expected = output.cross_entropy_BL.mean() + 0.5 * output.balance["load_balancing_loss"]
    torch.testing.assert_close(output.loss, expected)
    assert model.balancing is not None and model.balancing.step_counts_YE.sum(1).tolist() == [72]


@pytest.mark.parametrize("unit", ["sequence", "document"])
@pytest.mark.parametrize("router", ["top_k", "hash", "random"])
def test_units_are_routed_as_a_whole_in_the_model(
    unit: str, router: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = make_model({"router": {"name": router}, "unit": unit, "pooling": "full_mean"}).eval()
    context, targets_BL = make_batch()
    context = replace(context, document_BL=torch.arange(12).div(4, rounding_mode="floor").repeat(3, 1))
    for layer in model(context, targets_BL).layers:
        ids_BLK = layer.decision.expert_ids_TK.view(3, 12, 2)
        size = 12 if unit == "sequence" else 4
        assert torch.equal(ids_BLK, ids_BLK[:, ::size].repeat_interleave(size, 1))


def test_language_guided_routing_depends_on_the_label_alone(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model({"router": {"name": "top_k"}, "input": "domain_embedding"})
    assert model.needs_domains
    context, targets_BL = make_batch(6)
    output = model(context, targets_BL)
    for layer in output.layers:
        ids_BK = layer.decision.expert_ids_TK.view(6, 12, 2)
        assert (ids_BK == ids_BK[:, :1]).all() and torch.equal(ids_BK[:3], ids_BK[3:])
    output.loss.backward()
    assert model.blocks[0].routing.shown.domain_embedding.grad.abs().sum() > 0


@pytest.mark.parametrize("router", ["top_k", "random"])
def test_the_pass_ahead_counts_what_the_step_will_route(
    router: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    exact = {"load_balancing_loss": {"coefficient": 0.5, "estimator": "exact"}} if router == "top_k" else {}
    model = make_model({"router": {"name": router}, "balance": exact})
    assert model.reads_counts_ahead == bool(exact)
    batches = [make_batch(seed=seed) for seed in range(4)]
    model.begin_step(context for context, _ in batches)
    assert model.balancing is not None
    ahead_YE = model.balancing.counts_ahead_YE.clone()
    assert not model.balancing.step_counts_YE.any()
    for batch in batches:
        model(*batch)
    assert torch.equal(ahead_YE, model.balancing.step_counts_YE) and ahead_YE.sum(1).tolist() == [4 * 72] * 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_exact_gives_the_gradient_of_the_whole_batch(
    checkpointing: bool, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """Four micro-batches of one sequence against one of four, all parameters."""
    routing = {"router": {"name": "top_k"}, "balance": {"even": {"name": "load_balancing_loss", "estimator": "exact"}}}
    routing["balance"]["even"]["coefficient"] = 0.5  # type: ignore[index]
    context, targets_BL = make_batch(4)
    whole = make_model(routing)
    whole(context, targets_BL).loss.backward()
    parts = make_model(routing, activation_checkpointing=checkpointing)

    def row(b: int) -> RoutingContext:
        fields = ("token_ids_BL", "domain_BL", "document_BL", "position_BL", "sequence_B")
        return replace(context, **{name: getattr(context, name)[b : b + 1] for name in fields})

    parts.begin_step(row(b) for b in range(4))
    losses = [parts(row(b), targets_BL[b : b + 1]).loss / 4 for b in range(4)]
    torch.stack(losses).sum().backward()
    actual, expected = (torch.cat([g.flatten() for g in gradients(model).values()]) for model in (parts, whole))
    assert (actual - expected).norm() <= 1e-6 * expected.norm()


class _Broken:
    """Stands for a router's forward; changes one field of the decision."""

    def __init__(self, router: Any, **changes: Callable[[Tensor], Tensor]) -> None:
        self.router, self.changes = router, changes

    def __call__(self, x_TM: Tensor, context: RoutingContext) -> RoutingDecision:
        decision = type(self.router).forward(self.router, x_TM, context)
        return replace(decision, **{name: change(getattr(decision, name)) for name, change in self.changes.items()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_ids_TK": lambda ids: ids + 5}, "expert"),
        ({"expert_ids_TK": lambda ids: ids[:, :1]}, "shape|number|wide|expert"),
        ({"expert_ids_TK": lambda ids: ids.int()}, "int64"),
    ],
)
def test_a_bad_decision_is_stopped_with_router_layer_and_step(
    changes: dict[str, Any], message: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    model = make_model()
    router = model.routers()[1]
    router.forward = _Broken(router, **changes)  # type: ignore[method-assign]
    context, targets_BL = make_batch()
    with pytest.raises(RouterError, match=message) as error:
        model(replace(context, step=41), targets_BL)
    assert "top_k" in str(error.value) and "layer 1" in str(error.value) and "41" in str(error.value)


@pytest.mark.parametrize("name", ["weights_TK", "probabilities_TE", "logits_TE"])
def test_numbers_that_are_not_finite_reach_the_loss_in_training_and_stop_an_evaluation(
    name: str, make_model: MakeModel, make_batch: MakeBatch
) -> None:
    """In training all ranks see the loss; one that stopped alone would leave the others waiting."""
    model = make_model({"router": {"name": "top_k"}, "balance": {}})
    router = model.routers()[0]
    router.forward = _Broken(router, **{name: lambda values: values.clone().fill_(float("nan"))})  # type: ignore[method-assign]
    assert model(*make_batch()).loss.isnan()
    with pytest.raises(NotFiniteError, match=f"layer 0 at step 0 returned .* {name}"):
        model.eval()(*make_batch())
