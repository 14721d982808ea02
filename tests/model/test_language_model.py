"""The whole model: causality, recomputation, initial weights, the parts of the loss."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.model.initialisation import refuse_expert_names, refuse_scalars
from moe_testbed.model.language_model import LanguageModel, ModelOutput
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.layer import make_layer_router
from moe_testbed.routing.records import UNLABELLED, RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.routers.top_k import TopK, TopKConfig

MakeModel = Callable[..., LanguageModel]
MakeBatch = Callable[..., tuple[RoutingContext, Tensor]]

BALANCED = {
    "router": {"name": "top_k"},
    "balance": {
        "load_balancing_loss": {"coefficient": 0.1, "scope": "global_batch"},
        "z_loss": {"coefficient": 0.01},
        "loss_free_bias": {"update_rate": 0.01},
    },
}


def gradients(model: LanguageModel, output: ModelOutput) -> dict[str, Tensor]:
    model.zero_grad()
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ROUTERS.names())
def test_later_tokens_leave_earlier_losses_unchanged(name: str, make_model: MakeModel, make_batch: MakeBatch) -> None:
    if not ROUTERS.get(name).Config().causal:
        pytest.skip("the router looks ahead by design")
    model = make_model({"router": {"name": name}}).eval()
    context, targets_BL = make_batch()
    changed_BL = context.token_ids_BL.clone()
    changed_BL[:, 8:] = (changed_BL[:, 8:] + 1) % 37
    before = model(context, targets_BL).cross_entropy_BL
    after = model(replace(context, token_ids_BL=changed_BL), targets_BL).cross_entropy_BL
    torch.testing.assert_close(after[:, :8], before[:, :8])
    assert not torch.allclose(after[:, 8:], before[:, 8:])


def test_sequences_do_not_see_each_other(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model().eval()
    context, targets_BL = make_batch()
    alone = RoutingContext(
        context.token_ids_BL[1:2],
        context.domain_BL[1:2],
        context.document_BL[1:2],
        context.position_BL[1:2],
        context.sequence_B[1:2],
    )
    torch.testing.assert_close(
        model(alone, targets_BL[1:2]).cross_entropy_BL[0], model(context, targets_BL).cross_entropy_BL[1]
    )


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
def test_recomputing_activations_changes_nothing(dispatch: str, make_model: MakeModel, make_batch: MakeBatch) -> None:
    context, targets_BL = make_batch()
    results = []
    for checkpointing in (False, True):
        model = make_model(BALANCED, moe={"dispatch": dispatch}, activation_checkpointing=checkpointing)
        output = model(context, targets_BL)
        gradient = gradients(model, output)
        assert model.balancing is not None
        counts_YE = model.balancing.step_counts_YE.clone()
        model.finish_step()
        bias_YE = model.balancing.selection_bias_YE()
        assert bias_YE is not None and bool(bias_YE.any())
        results.append((output.loss.detach(), output.balance, counts_YE, bias_YE, gradient))
    plain, recomputed = results
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    # Twelve tokens of three sequences, two experts each: nothing is counted twice.
    assert plain[2].sum(1).tolist() == [72, 72]


def test_loss_is_cross_entropy_plus_coefficient_times_terms(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(BALANCED)
    context, targets_BL = make_batch()
    output = model(context, targets_BL)
    balance, z = output.balance["load_balancing_loss"], output.balance["z_loss"]
    expected = output.cross_entropy_BL.mean() + 2 * (0.1 * balance + 0.01 * z)
    torch.testing.assert_close(output.loss, expected)
    fraction_YE = model.balancing.step_counts_YE / 72  # type: ignore[union-attr]
    by_hand = [
        model.config.moe.num_experts * (fraction_E * layer.decision.probabilities_TE.mean(0)).sum()
        for fraction_E, layer in zip(fraction_YE, output.layers, strict=True)
    ]
    torch.testing.assert_close(balance, torch.stack(by_hand).mean())


def test_evaluation_has_no_balancing_loss_and_counts_nothing(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(BALANCED).eval()
    output = model(*make_batch())
    assert output.balance == {}
    assert torch.equal(output.loss, output.cross_entropy_BL.mean())
    assert model.balancing is not None and not bool(model.balancing.step_counts_YE.any())


def test_the_selection_bias_steers_the_choice_and_not_the_weights(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(BALANCED).eval()
    context, targets_BL = make_batch()
    assert model.balancing is not None
    bias = model.balancing.get_buffer("balancers.loss_free_bias.bias_YE")
    bias[0, 4] = 100.0
    first, second = model(context, targets_BL).layers
    assert bool((first.decision.expert_ids_TK[:, 0] == 4).all())
    assert not bool((second.decision.expert_ids_TK[:, 0] == 4).all())
    assert first.decision.probabilities_TE is not None
    chosen_TK = first.decision.probabilities_TE.gather(1, first.decision.expert_ids_TK)
    torch.testing.assert_close(first.decision.weights_TK, chosen_TK / chosen_TK.sum(1, keepdim=True))


def test_initial_weights_do_not_depend_on_the_router(make_model: MakeModel) -> None:
    def shared(model: LanguageModel) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in model.state_dict().items()
            if ".routing." not in name and "balancing" not in name
        }

    reference = shared(make_model({"router": {"name": "top_k"}}))
    for name in ROUTERS.names():
        torch.testing.assert_close(shared(make_model({"router": {"name": name}})), reference, rtol=0, atol=0)
    other_seed = shared(make_model(seed=4))
    assert all(not torch.equal(other_seed[name], reference[name]) for name in reference if "norm" not in name)


def test_initial_weights_of_layers_and_experts_differ(make_model: MakeModel) -> None:
    state = make_model().state_dict()
    draws = [value.flatten()[:64] for name, value in state.items() if "norm" not in name and "balancing" not in name]
    # Scaled copies would have a correlation of 1.
    correlation = torch.corrcoef(torch.stack([draw[: min(map(len, draws))] for draw in draws])).fill_diagonal_(0)
    assert correlation.abs().max() < 0.9


def test_weights_depend_on_the_router_s_own_draw_alone(make_model: MakeModel) -> None:
    torch.manual_seed(1)
    first = make_model().state_dict()
    torch.manual_seed(2)
    torch.testing.assert_close(make_model().state_dict(), first, rtol=0, atol=0)


def test_shared_experts_are_added_outside_the_routing(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(moe={"num_shared_experts": 2})
    context, _ = make_batch()
    block = model.blocks[0]
    x_BLM = torch.randn(3, 12, 16)
    with_shared, routing = block(x_BLM, model.positions, context, None)
    shared, block.shared = block.shared, None
    assert shared is not None and shared.up.weight.shape == (16, 16)
    without, other_routing = block(x_BLM, model.positions, context, None)
    assert torch.equal(routing.decision.expert_ids_TK, other_routing.decision.expert_ids_TK)
    attended = x_BLM + block.attention(block.attention_norm(x_BLM), model.positions)
    torch.testing.assert_close(with_shared, without + shared(block.feed_forward_norm(attended)))


def test_moe_layers_are_every_nth(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(moe={"every": 2}, num_layers=5)
    assert [block.moe is not None for block in model.blocks] == [False, True, False, True, False]
    assert len(model(*make_batch()).layers) == 2


def test_names_that_checkpoints_cannot_hold_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    model.blocks[0].routing.router.register_parameter("expert_scale", nn.Parameter(torch.ones(3)))
    refuse_expert_names(model)
    model.blocks[1].moe.register_buffer("expert_scale", torch.ones(3))
    with pytest.raises(ValueError, match=r"'blocks\.1\.moe\.expert_scale' lies in an MoE layer.*rename"):
        refuse_expert_names(model)


def test_parameters_that_deepspeed_cannot_send_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    refuse_scalars(model)
    model.blocks[1].routing.router.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(ValueError, match=r"'blocks\.1\.routing\.router\.scale' has no dimensions.*shape \[1\]"):
        refuse_scalars(model)


def test_a_router_that_needs_labels_refuses_tokens_without(make_model: MakeModel, make_batch: MakeBatch) -> None:
    context, targets_BL = make_batch()
    domain_BL = context.domain_BL.clone()
    domain_BL[0, 0] = UNLABELLED
    unlabelled = replace(context, domain_BL=domain_BL)
    routing = {"router": {"name": "reference"}}
    with pytest.raises(ValueError, match="the router needs a domain label for every token"):
        make_model(routing)(unlabelled, targets_BL)
    make_model({"router": {"name": "top_k"}})(unlabelled, targets_BL)
    make_model(routing, dense_baseline=True)(unlabelled, targets_BL)


def test_casting_keeps_the_balancers_state_in_float32(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(BALANCED)
    assert model.balancing is not None
    bias = model.balancing.get_buffer("balancers.loss_free_bias.bias_YE")
    bias += 1 + 2**-20  # not a bfloat16
    model = model.bfloat16()
    kept = model.balancing.get_buffer("balancers.loss_free_bias.bias_YE")
    assert kept.dtype == torch.float32 and torch.equal(kept, torch.full_like(kept, 1 + 2**-20))
    assert model.embedding.weight.dtype == torch.bfloat16
    output = model(*make_batch())
    decision = output.layers[0].decision
    assert output.cross_entropy_BL.dtype == decision.weights_TK.dtype == torch.float32
    output.loss.backward()
    model.finish_step()
    assert model.balancing.get_buffer("balancers.loss_free_bias.bias_YE").dtype == torch.float32


def test_cross_entropy_is_of_the_tied_embedding(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(dense_baseline=True).eval()
    context, targets_BL = make_batch()
    x_BLM = model.embedding(context.token_ids_BL)
    for block in model.blocks:
        x_BLM = x_BLM + block.attention(block.attention_norm(x_BLM), model.positions)
        x_BLM = x_BLM + block.dense(block.feed_forward_norm(x_BLM))
    logits_BLV = model.final_norm(x_BLM) @ model.embedding.weight.T
    oracle_BL = -F.log_softmax(logits_BLV, -1).gather(-1, targets_BL[..., None]).squeeze(-1)
    output = model(context, targets_BL)
    assert output.layers == []
    torch.testing.assert_close(output.cross_entropy_BL, oracle_BL)


@pytest.mark.parametrize("router", ["top_k", "hash", "reference", "cosine"])
def test_a_model_on_the_meta_device_has_the_parameters_of_a_real_one(make_model: MakeModel, router: str) -> None:
    options: dict[str, Any] = {
        "routing": {"router": {"name": router}},
        "moe": {"num_experts": 6, "num_shared_experts": 1, "num_constant_experts": 1},
    }
    real = make_model(**options)
    with torch.device("meta"):
        counted = make_model(**options)
    for (name, parameter), (other_name, other) in zip(real.named_parameters(), counted.named_parameters(), strict=True):
        assert (name, parameter.shape, parameter.requires_grad) == (other_name, other.shape, other.requires_grad)
    assert counted.embedding.weight.is_meta and counted.moe_layers()[0].experts.down.is_meta


def test_a_router_that_looks_at_its_tensors_is_built_on_the_cpu_where_a_model_is_only_counted() -> None:
    class Looks(TopK):
        def __init__(self, config: TopKConfig, setting: RouterSetting) -> None:
            super().__init__(config, setting)
            assert self.scorer.weight.abs().sum().item() > 0

    setting = RouterSetting(4, 2, 8, 0, 1, ("all",), (1.0,), torch.ones(1, 5, dtype=torch.int64))
    config = RoutingConfig.model_validate({"router": {"name": "top_k"}})
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(ROUTERS, "get", lambda name: Looks)
        router = make_layer_router(config, setting).router
    assert {name: tuple(p.shape) for name, p in router.named_parameters()} == {"scorer.weight": (4, 8)}


def test_no_deepspeed_is_imported_to_build_a_model() -> None:
    code = "import sys, moe_testbed.model.language_model; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
