"""The z-loss and the loss-free bias by themselves."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.balance.balancers.load_balancing_loss import LoadBalancingLossConfig
from moe_testbed.routing.balance.balancers.loss_free_bias import LossFreeBiasConfig
from moe_testbed.routing.balance.balancers.z_loss import z_loss
from moe_testbed.routing.balance.balancing import Balancing
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Scope
from tests.routing.cases import hidden_states, make_context, make_router
from tests.routing.naive_balance import UPDATES, NaiveLayer, count, naive_direction, naive_window

E, LENGTH, WINDOW = 6, 4, 3
SCOPES = [scope.value for scope in Scope]


def test_z_loss_is_the_mean_of_squared_log_sum_exps():
    logits_TE = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    log_sums = [math.log(sum(math.exp(z) for z in row)) for row in logits_TE.tolist()]
    loss = z_loss(logits_TE)
    assert loss.item() == pytest.approx(sum(s**2 for s in log_sums) / 9, rel=1e-12)
    # d/dz of lse^2 is 2 lse softmax.
    expected_TE = 2 * torch.tensor(log_sums)[:, None] * logits_TE.detach().softmax(-1) / 9
    torch.testing.assert_close(torch.autograd.grad(loss, logits_TE)[0], expected_TE, check_dtype=False)


def test_z_loss_of_equal_logits_in_closed_form():
    assert z_loss(torch.zeros(3, 8)).item() == pytest.approx(math.log(8) ** 2)
    assert z_loss(torch.full((3, 8), -math.log(8))).item() == pytest.approx(0.0, abs=1e-12)


def test_z_loss_leaves_padding_out():
    logits_TE, valid_T = torch.randn(6, 5), torch.tensor([True, False, True, True, False, False])
    assert z_loss(logits_TE, valid_T).item() == pytest.approx(z_loss(logits_TE[valid_T]).item(), rel=1e-6)
    assert z_loss(logits_TE, torch.zeros(6, dtype=torch.bool)) == 0


def decision_of(experts: list[list[int]]) -> RoutingDecision:
    expert_ids_TK = torch.tensor(experts)
    return RoutingDecision(expert_ids_TK, torch.ones(expert_ids_TK.shape), torch.full((len(experts), E), 1 / E))


def random_decision(sequences: int = 2, top_k: int = 2) -> RoutingDecision:
    """Uneven on purpose: expert e is chosen with odds E - e."""
    odds_TE = torch.arange(E, 0, -1).double().expand(sequences * LENGTH, E)
    return decision_of(odds_TE.multinomial(top_k).tolist())


def run(balancing: Balancing, steps: list[list[list[RoutingDecision]]], context: RoutingContext) -> list[Tensor]:
    """Bias after each step; a step is a list of micro-batches, a micro-batch a list of layers."""
    biases = []
    for micro_batches in steps:
        for layers in micro_batches:
            balancing(layers, context)
        balancing.finish_step()
        bias_YE = balancing.selection_bias_YE()
        assert bias_YE is not None
        biases.append(bias_YE.clone())
    return biases


def bias_balancing(
    scope: str = "global_batch", rate: float = 0.01, num_layers: int = 2, update: str = "sign"
) -> Balancing:
    options = {"scope": scope, "update_rate": rate, "update": update}
    if scope == "window":
        options["window_steps"] = WINDOW
    return Balancing({"loss_free_bias": LossFreeBiasConfig.model_validate(options)}, num_layers, E, 2)


@pytest.mark.parametrize("name", ["top_k", "top_k_softmax", "sigmoid", "reference"])
def test_a_zero_bias_is_no_bias(name: str):
    router, context = make_router((name, {})), make_context()
    zero_YE = Balancing({"loss_free_bias": LossFreeBiasConfig()}, 2, 24, 2).selection_bias_YE()
    assert zero_YE is not None and zero_YE.dtype == torch.float32
    x_TM = hidden_states(context)
    biased = router(x_TM, replace(context, selection_bias_YE=zero_YE))
    plain = router(x_TM, context)
    assert torch.equal(biased.expert_ids_TK, plain.expert_ids_TK)
    assert torch.equal(biased.weights_TK, plain.weights_TK)


def test_without_a_bias_balancer_there_is_no_bias():
    assert Balancing({"load_balancing_loss": LoadBalancingLossConfig()}, 2, E, 2).selection_bias_YE() is None


@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("scope", [scope for scope in SCOPES if scope != "window"])
def test_the_overloaded_experts_bias_falls_and_the_mean_stays_zero(scope: str, update: str):
    overloaded = decision_of([[0, 1 + t % 5] for t in range(2 * LENGTH)])
    balancing = bias_balancing(scope, num_layers=1, update=update)
    (bias_YE,) = run(balancing, [[[overloaded]]], make_context(2, LENGTH))
    assert bias_YE[0].argmin() == 0 and bias_YE[0, 0] < 0 < bias_YE[0, 1:].max()
    assert abs(bias_YE[0].mean()) < 1e-8
    # One more update in the same direction, and back again when the others are overloaded.
    lower = run(balancing, [[[overloaded]]], make_context(2, LENGTH))[0][0, 0]
    relieved = decision_of([[1 + t % 5, 1 + (t + 1) % 5] for t in range(2 * LENGTH)])
    higher = run(balancing, [[[relieved]]], make_context(2, LENGTH))[0][0, 0]
    assert lower < bias_YE[0, 0] and lower < higher


def test_an_even_load_moves_no_bias():
    """Whatever E: the mean count is compared without rounding."""
    for num_experts in (3, 6, 7, 49):
        balancing = Balancing({"loss_free_bias": LossFreeBiasConfig(scope="micro_batch")}, 1, num_experts, 3)
        expert_ids_TK = (torch.arange(2 * num_experts)[:, None] + torch.arange(3)) % num_experts
        probabilities_TE = torch.full((2 * num_experts, num_experts), 1 / num_experts)
        even = RoutingDecision(expert_ids_TK, torch.ones(expert_ids_TK.shape), probabilities_TE)
        (bias_YE,) = run(balancing, [[[even]]], make_context(num_experts, 2))
        assert (bias_YE == 0).all()


@pytest.mark.parametrize("update", ["sign", "proportional"])
@pytest.mark.parametrize("scope", SCOPES)
def test_bias_against_a_loop_over_steps_and_micro_batches(scope: str, update: str):
    document_BL = torch.tensor([[0, 0, 1, 0], [1, 1, 1, 2]])
    context, rate = replace(make_context(2, LENGTH), document_BL=document_BL), 0.01
    steps = [[[random_decision() for _ in range(2)] for _ in range(3)] for _ in range(4)]
    actual = run(bias_balancing(scope, rate, update=update), steps, context)

    bias = [[0.0] * E for _ in range(2)]
    history: list[list[list[int]]] = [[], []]
    for step, micro_batches in enumerate(steps):
        for layer in range(2):
            documents = document_BL.flatten().tolist()
            experts = [layers[layer].expert_ids_TK.tolist() for layers in micro_batches]
            naive = [NaiveLayer(ids, torch.zeros(2 * LENGTH, E), [True] * 2 * LENGTH, documents) for ids in experts]
            history[layer].append(count(naive, E))
            if scope == "global_batch":
                direction = UPDATES[update](history[layer][-1])
            elif scope == "window":
                direction = UPDATES[update](naive_window(history[layer], WINDOW))
            else:
                narrow = "micro_batch" if scope == "data_parallel" else scope
                directions = [naive_direction(one, narrow, LENGTH, update) for one in naive]
                direction = [sum(column) / len(naive) for column in zip(*directions, strict=True)]
            mean = sum(direction) / E
            bias[layer] = [b + rate * (d - mean) for b, d in zip(bias[layer], direction, strict=True)]
        torch.testing.assert_close(actual[step], torch.tensor(bias), rtol=1e-5, atol=1e-7)


def test_an_estimator_that_the_bias_would_ignore_is_refused():
    with pytest.raises(ValueError, match="estimator is exact, but the bias moves once the step is complete"):
        LossFreeBiasConfig.model_validate({"estimator": "exact"})


@pytest.mark.parametrize("scope", ["sequence", "global_batch", "window"])
def test_a_resumed_run_continues_the_bias_bit_for_bit(scope: str):
    context = make_context(2, LENGTH)
    steps = [[[random_decision() for _ in range(2)] for _ in range(2)] for _ in range(6)]
    whole = run(bias_balancing(scope, 1e-3), steps, context)
    first, second = bias_balancing(scope, 1e-3), bias_balancing(scope, 1e-3)
    run(first, steps[:3], context)
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.stack(run(second, steps[3:], context)), torch.stack(whole[3:]))
