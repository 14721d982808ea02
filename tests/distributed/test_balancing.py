"""Balancing over ranks and micro-batches against the formulas, computed in one process.

Shape legend: R ranks, X steps or micro-batches of a step, T tokens of a micro-batch, E experts, K choices, M model
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.routing.balance.balancing import Balancing
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.records import RoutingContext, RoutingDecision

E, K, M = 6, 2, 5
SEQUENCES, LENGTH = 2, 8
T = SEQUENCES * LENGTH


def inputs(num_steps: int, num_ranks: int, num_micro: int) -> tuple[Tensor, Tensor]:
    """Hidden states [X, R, X, T, M] and a router's weight [E, M]."""
    generator = torch.Generator().manual_seed(2)
    x_XRXTM = torch.randn(num_steps, num_ranks, num_micro, T, M, generator=generator) + 0.3
    return x_XRXTM, torch.randn(E, M, generator=generator)


def route(x_TM: Tensor, weight_EM: Tensor) -> RoutingDecision:
    logits_TE = x_TM @ weight_EM.T
    probabilities_TE = logits_TE.softmax(-1)
    ids_TK = logits_TE.topk(K, dim=-1).indices
    return RoutingDecision(ids_TK, probabilities_TE.gather(1, ids_TK), probabilities_TE, logits_TE)


def context(num_sequences: int) -> RoutingContext:
    zeros = torch.zeros(num_sequences, LENGTH, dtype=torch.int64)
    return RoutingContext(zeros, zeros, zeros, zeros, torch.arange(num_sequences))


def balance(options: dict[str, Any], x_XRXTM: Tensor, weight_EM: Tensor) -> list[dict[str, Any]]:
    """This rank's losses, gradient of their mean over micro-batches, and biases, step by step."""
    configs = RoutingConfig.model_validate({"router": {"name": "top_k"}, "balance": options}).balance
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    balancing = Balancing(configs, num_layers=1, num_experts=E, top_k=K, data_parallel_group=group)
    steps = []
    for x_XTM in x_XRXTM[:, dist.get_rank()]:
        weight = weight_EM.clone().requires_grad_()
        decisions = [[route(x_TM, weight)] for x_TM in x_XTM]
        if balancing.reads_counts_ahead and len(decisions) > 1:
            balancing.begin_step([(layers, None) for layers in decisions])
        terms = [balancing(layers, context(len(x_XTM[0]) // LENGTH)) for layers in decisions]
        loss = torch.stack([term.loss for term in terms]).mean()
        gradient = torch.autograd.grad(loss, weight)[0] if loss.requires_grad else torch.zeros_like(weight)
        balancing.finish_step()
        bias_YE = balancing.selection_bias_YE()
        steps.append(
            {
                "losses": [term.loss.detach() for term in terms],
                "loss": loss.detach(),
                "gradient": gradient,
                "bias": None if bias_YE is None else bias_YE.clone(),
                "counts": balancing.previous_counts_YE.clone(),
            }
        )
    return steps


def count(decisions: list[RoutingDecision]) -> Tensor:
    counts_E = torch.zeros(E)
    for decision in decisions:
        for expert in decision.expert_ids_TK.flatten().tolist():
            counts_E[expert] += 1
    return counts_E


def balancing_loss(counts_E: Tensor, decision: RoutingDecision) -> Tensor:
    """``E * sum_i f_i * P_i``."""
    assert decision.probabilities_TE is not None
    return E * ((counts_E / counts_E.sum()) * decision.probabilities_TE.mean(0)).sum()


def mean_of(ranks: list[list[dict[str, Any]]], step: int, key: str) -> Tensor:
    return torch.stack([rank[step][key] for rank in ranks]).mean(0)


def test_data_parallel_scope_gives_the_gradient_of_the_concatenated_batch(
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    x_XRXTM, weight_EM = inputs(1, 2, 1)
    options = {"load_balancing_loss": {"coefficient": 1.0, "scope": "data_parallel"}}
    ranks = run_on_ranks(balance, 2, options, x_XRXTM, weight_EM)
    weight = weight_EM.clone().requires_grad_()
    whole = route(x_XRXTM[0, :, 0].reshape(2 * T, M), weight)
    oracle = balancing_loss(count([whole]), whole)
    torch.testing.assert_close(torch.stack([rank[0]["losses"][0] for rank in ranks]).mean(), oracle.detach())
    torch.testing.assert_close(mean_of(ranks, 0, "gradient"), torch.autograd.grad(oracle, weight)[0])
    # The scope matters: each rank by itself would give another gradient.
    alone = run_on_ranks(
        balance, 2, {"load_balancing_loss": {"coefficient": 1.0, "scope": "micro_batch"}}, *inputs(1, 2, 1)
    )
    assert not torch.allclose(mean_of(alone, 0, "gradient"), mean_of(ranks, 0, "gradient"), rtol=1e-3)


def entropy_loss(decision: RoutingDecision) -> Tensor:
    def entropy(p_XE: Tensor) -> Tensor:
        return -(p_XE * p_XE.log()).sum(-1) / math.log(E)

    assert decision.probabilities_TE is not None
    return entropy(decision.probabilities_TE).mean() - entropy(decision.probabilities_TE.mean(0))


def variance_loss(decision: RoutingDecision) -> Tensor:
    assert decision.probabilities_TE is not None
    return -decision.probabilities_TE.var(0, correction=0).sum() * E / (E - 1)


def importance_loss(decision: RoutingDecision) -> Tensor:
    chosen_TKE = torch.nn.functional.one_hot(decision.expert_ids_TK, E)
    importance_E = (decision.weights_TK[..., None] * chosen_TKE).sum((0, 1))
    return importance_E.var(correction=0) / importance_E.mean() ** 2


NOT_LINEAR = {"entropy": entropy_loss, "variance": variance_loss, "importance": importance_loss}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_loss_that_is_not_linear_is_that_of_the_concatenated_batch(
    name: str, run_on_ranks: Callable[..., list[Any]]
) -> None:
    x_XRXTM, weight_EM = inputs(1, 2, 2)
    options = {name: {"coefficient": 1.0, "scope": "data_parallel"}}
    ranks = run_on_ranks(balance, 2, options, x_XRXTM, weight_EM)
    weight = weight_EM.clone().requires_grad_()
    oracles = [NOT_LINEAR[name](route(x_XRXTM[0, :, micro].reshape(2 * T, M), weight)) for micro in range(2)]
    for rank in ranks:
        for loss, oracle in zip(rank[0]["losses"], oracles, strict=True):
            torch.testing.assert_close(loss, oracle.detach(), rtol=1e-5, atol=1e-7)
    gradient_EM = torch.autograd.grad(torch.stack(oracles).mean(), weight)[0]
    torch.testing.assert_close(mean_of(ranks, 0, "gradient"), gradient_EM, rtol=1e-4, atol=1e-7)
    # The mean of the ranks' own losses is another.
    options[name]["scope"] = "micro_batch"
    alone = run_on_ranks(balance, 2, options, x_XRXTM, weight_EM)
    assert (mean_of(alone, 0, "gradient") - gradient_EM).norm() > 1e-3 * gradient_EM.norm()


def test_exact_is_the_same_for_every_way_to_split_the_batch(run_on_ranks: Callable[..., list[Any]]) -> None:
    """Loss and gradient, over two steps."""
    x_XXXTM, weight_EM = inputs(2, 4, 1)
    x_XXTM = x_XXXTM.squeeze(2)
    options = {"load_balancing_loss": {"coefficient": 1.0, "scope": "global_batch", "estimator": "exact"}}
    for num_ranks, micro_batches in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1)):
        x_XRXTM = x_XXTM.reshape(2, num_ranks, micro_batches, -1, M)
        ranks = run_on_ranks(balance, num_ranks, options, x_XRXTM, weight_EM)
        for step, x_XTM in enumerate(x_XXTM):
            weight = weight_EM.clone().requires_grad_()
            decision = route(x_XTM.reshape(-1, M), weight)
            oracle = balancing_loss(count([decision]), decision)
            gradient_EM = torch.autograd.grad(oracle, weight)[0]
            loss = mean_of(ranks, step, "loss")
            assert (loss - oracle).abs() <= 1e-6 * oracle, (num_ranks, micro_batches)
            error = (mean_of(ranks, step, "gradient") - gradient_EM).norm()
            assert error <= 1e-6 * gradient_EM.norm(), (num_ranks, micro_batches)


def test_window_scope_averages_the_steps_of_all_ranks(run_on_ranks: Callable[..., list[Any]]) -> None:
    x_XRXTM, weight_EM = inputs(4, 2, 2)
    options: dict[str, Any] = {
        "load_balancing_loss": {"coefficient": 1.0, "scope": "window", "window_steps": 3},
        "loss_free_bias": {"update_rate": 0.1, "scope": "window", "window_steps": 3, "update": "proportional"},
    }
    ranks = run_on_ranks(balance, 2, options, x_XRXTM, weight_EM)
    window_E, bias_E = None, torch.zeros(E)
    for step, x_RXTM in enumerate(x_XRXTM):
        decisions_RX = [[route(x_TM, weight_EM) for x_TM in x_XTM] for x_XTM in x_RXTM]
        for micro in range(2):
            so_far_E = count([row[m] for row in decisions_RX for m in range(micro + 1)])
            for rank in range(2):
                loss = balancing_loss(so_far_E if window_E is None else window_E, decisions_RX[rank][micro])
                torch.testing.assert_close(ranks[rank][step]["losses"][micro], loss)
        counts_E = count([decision for row in decisions_RX for decision in row])
        window_E = counts_E if window_E is None else window_E * 2 / 3 + counts_E / 3
        bias_E = bias_E + 0.1 * (1 - window_E / window_E.mean())
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][step]["bias"][0], bias_E)


@pytest.mark.parametrize("estimator", ["online", "previous"])
def test_global_batch_scope_follows_its_formula(estimator: str, run_on_ranks: Callable[..., list[Any]]) -> None:
    x_XRXTM, weight_EM = inputs(2, 2, 2)
    options = {"load_balancing_loss": {"coefficient": 1.0, "scope": "global_batch", "estimator": estimator}}
    ranks = run_on_ranks(balance, 2, options, x_XRXTM, weight_EM)
    previous_E = None
    for step, x_RXTM in enumerate(x_XRXTM):
        weight = weight_EM.clone().requires_grad_()
        decisions_RX = [[route(x_TM, weight) for x_TM in x_XTM] for x_XTM in x_RXTM]
        total = torch.zeros(())
        for micro in range(2):
            so_far_E = count([row[m] for row in decisions_RX for m in range(micro + 1)])
            counts_E = previous_E if estimator == "previous" and previous_E is not None else so_far_E
            for rank in range(2):
                loss = balancing_loss(counts_E, decisions_RX[rank][micro])
                torch.testing.assert_close(ranks[rank][step]["losses"][micro], loss.detach())
                total = total + loss / 4
        torch.testing.assert_close(mean_of(ranks, step, "gradient"), torch.autograd.grad(total, weight)[0])
        previous_E = count([decision for row in decisions_RX for decision in row])
        for rank in range(2):
            assert torch.equal(ranks[rank][step]["counts"][0].float(), previous_E)


def test_loss_free_bias_is_the_same_on_all_ranks_and_in_one_process(run_on_ranks: Callable[..., list[Any]]) -> None:
    x_XRXTM, weight_EM = inputs(3, 2, 2)
    ranks = run_on_ranks(balance, 2, {"loss_free_bias": {"update_rate": 0.1}}, x_XRXTM, weight_EM)
    bias_E = torch.zeros(E)
    for step, x_RXTM in enumerate(x_XRXTM):
        counts_E = count([route(x_TM, weight_EM) for x_TM in x_RXTM.flatten(0, 1)])
        update_E = 0.1 * torch.sign(counts_E.mean() - counts_E)
        bias_E = bias_E + update_E - update_E.mean()
        assert torch.equal(ranks[0][step]["bias"], ranks[1][step]["bias"])
        torch.testing.assert_close(ranks[0][step]["bias"][0], bias_E)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "data_parallel"])
def test_loss_free_bias_of_a_smaller_scope_averages_over_its_sets(
    scope: str, run_on_ranks: Callable[..., list[Any]]
) -> None:
    x_XRXTM, weight_EM = inputs(1, 2, 2)
    ranks = run_on_ranks(balance, 2, {"loss_free_bias": {"update_rate": 0.1, "scope": scope}}, x_XRXTM, weight_EM)
    x_RXTM = x_XRXTM[0]
    sets = {
        "sequence": x_RXTM.reshape(-1, LENGTH, M),
        "micro_batch": x_RXTM.reshape(-1, T, M),
        "data_parallel": x_RXTM.transpose(0, 1).reshape(-1, 2 * T, M),
    }[scope]
    directions_GE = []
    for x_TM in sets:
        counts_E = count([route(x_TM, weight_EM)])
        directions_GE.append(torch.sign(counts_E.mean() - counts_E))
    direction_E = torch.stack(directions_GE).mean(0)
    for rank in ranks:
        torch.testing.assert_close(rank[0]["bias"][0], 0.1 * (direction_E - direction_E.mean()))


def test_z_loss_averages_to_that_of_the_whole_batch(run_on_ranks: Callable[..., list[Any]]) -> None:
    x_XRXTM, weight_EM = inputs(1, 2, 2)
    ranks = run_on_ranks(balance, 2, {"z_loss": {"coefficient": 1.0}}, x_XRXTM, weight_EM)
    weight = weight_EM.clone().requires_grad_()
    oracle = torch.logsumexp(x_XRXTM.reshape(-1, M) @ weight.T, -1).square().mean()
    torch.testing.assert_close(mean_of(ranks, 0, "gradient"), torch.autograd.grad(oracle, weight)[0])
