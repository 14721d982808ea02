"""What the routers that choose over pools are for: even loads, by the best choice there is."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_testbed.routing.load import count_assignments
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import Router
from moe_testbed.routing.routers.parts.pools import pool_tokens
from moe_testbed.routing.routers.parts.transport import balanced_assignment, sinkhorn_bias
from moe_testbed.routing.routers.quantile import quantile_prices
from moe_testbed.routing.scopes import Scope
from tests.routing.cases import assert_same_decision, hidden_states, make_context, make_router, run_step
from tests.routing.oracles_pool import naive_prices

POOLS = ["sequence", "document", "micro_batch", "data_parallel"]
every_pool = pytest.mark.parametrize("pool", POOLS)


def padded_context(sequences: int = 6, length: int = 8) -> RoutingContext:
    """A fifth of the tokens is padding, and one sequence all of it."""
    context = make_context(sequences, length)
    valid_BL = torch.rand(sequences, length) < 0.8
    valid_BL[2] = False
    return replace(context, valid_BL=valid_BL)


def skewed(context: RoutingContext) -> Tensor:
    """Hidden states that have much in common, so that the same experts are wanted by all."""
    return hidden_states(context) + 2 * torch.ones(6)


def loads(router: Router, x_TM: Tensor, context: RoutingContext, token_U: Tensor) -> Tensor:
    return count_assignments(router(x_TM, context).expert_ids_TK[token_U], router.setting.num_experts)


@every_pool
@pytest.mark.parametrize("factor", [0.05, 1.0, 1.3, 40.0])
def test_every_expert_takes_exactly_its_capacity_of_every_pool(pool: str, factor: float):
    router = make_router(("expert_choice", {"pool": pool, "capacity_factor": factor}), num_experts=5)
    context = padded_context()
    x_TM = skewed(context)
    for token_U in pool_tokens(Scope(pool), context):
        capacity = min(max(math.ceil(factor * 2 * len(token_U) / 5), 1), len(token_U))
        assert loads(router, x_TM, context, token_U).tolist() == [capacity] * 5
    decision = router(x_TM, context)
    padding_T = ~context.valid_BL.flatten()
    assert (decision.expert_ids_TK[padding_T] == -1).all() and (decision.weights_TK[padding_T] == 0).all()


def test_a_token_may_be_taken_by_many_experts_or_by_none():
    """Three tokens want expert 0 only; the fourth is indifferent, and so the best that the other experts can get."""
    router, context = make_router(("expert_choice", {}), num_experts=4, top_k=1), make_context(1, 4)
    with torch.no_grad():
        router.scorer.weight.zero_()[0, 0] = 1.0
    x_TM = torch.zeros(4, 6)
    x_TM[:3, 0] = torch.tensor([5.0, 6.0, 7.0])
    taken = [sorted(set(experts) - {-1}) for experts in router(x_TM, context).expert_ids_TK.tolist()]
    assert taken == [[], [], [0], [1, 2, 3]]


@every_pool
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_base_loads_every_expert_equally(pool: str, top_k: int):
    router = make_router(("base", {"pool": pool}), top_k, num_experts=6)
    context = padded_context()
    x_TM = skewed(context)
    for token_U in pool_tokens(Scope(pool), context):
        due = len(token_U) * top_k / 6
        counts = loads(router, x_TM, context, token_U).tolist()
        assert {math.floor(due), math.ceil(due)} >= set(counts)


def balanced_assignments(tokens: int, num_experts: int) -> list[tuple[int, ...]]:
    """All ways to give every token an expert with loads that are equal up to rounding."""
    low, high = tokens // num_experts, -(-tokens // num_experts)
    return [
        chosen
        for chosen in itertools.product(range(num_experts), repeat=tokens)
        if all(low <= chosen.count(e) <= high for e in range(num_experts))
    ]


@pytest.mark.parametrize("tokens, num_experts", [(6, 3), (7, 3), (5, 4), (3, 5), (1, 2), (8, 2)])
def test_no_balanced_assignment_is_better(tokens: int, num_experts: int):
    """All of them are tried."""
    candidates = balanced_assignments(tokens, num_experts)
    for seed in range(10):
        scores_UE = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(seed))
        scores_UE = scores_UE * 10.0 ** (seed % 5 - 2) + torch.arange(num_experts)
        found = balanced_assignment(scores_UE, 1)[:, 0].tolist()
        assert tuple(found) in candidates
        rows = scores_UE.double().tolist()
        value = {chosen: math.fsum(rows[t][e] for t, e in enumerate(chosen)) for chosen in candidates}
        assert value[tuple(found)] == pytest.approx(max(value.values()))


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_no_exchange_of_tokens_improves_a_large_assignment(spread: float):
    """An assignment is the best one exactly if no cycle of experts, each handing one token on, gains."""
    U, E = 300, 12
    scores_UE = torch.randn(U, E, dtype=torch.float64) + spread * torch.randn(E)
    chosen_U = balanced_assignment(scores_UE, 1)[:, 0]
    assert torch.bincount(chosen_U).tolist() == [U // E] * E
    gain_UE = scores_UE - scores_UE.gather(1, chosen_U[:, None])
    best = torch.stack([gain_UE[chosen_U == e].amax(0) for e in range(E)])
    for through in range(E):
        best = torch.maximum(best, best[:, through : through + 1] + best[through])
    assert best.diagonal().max() <= 1e-9


@pytest.mark.parametrize("tokens, num_experts, top_k", [(12, 4, 3), (5, 3, 2), (1, 4, 3), (2, 7, 7), (9, 6, 5)])
def test_more_choices_are_the_best_of_what_is_left(tokens: int, num_experts: int, top_k: int):
    scores_UE = torch.randn(tokens, num_experts)
    ids_UK = balanced_assignment(scores_UE, top_k)
    for choice in range(1, top_k + 1):
        counts = torch.bincount(ids_UK[:, :choice].flatten(), minlength=num_experts).tolist()
        due = choice * tokens / num_experts
        assert {math.floor(due), math.ceil(due)} >= set(counts)
    assert all(len(set(row)) == top_k for row in ids_UK.tolist())
    # With fewer choices the first ones are the same.
    assert torch.equal(balanced_assignment(scores_UE, 1), ids_UK[:, :1])


def test_where_no_balanced_choice_is_left_tokens_still_get_different_experts():
    """Of these scores the first six choices leave no balanced seventh."""
    scores_UE = torch.randn(4, 8, generator=torch.Generator().manual_seed(10))
    assert all(len(set(row)) == 7 for row in balanced_assignment(scores_UE, 7).tolist())


@pytest.mark.parametrize("name", ["base", "sinkhorn", "expert_choice"])
def test_scores_that_are_not_finite_reach_the_guard(name: str):
    """They must not end in an error of the solver, which would name neither router nor layer."""
    router, context = make_router((name, {})), make_context()
    x_TM = hidden_states(context)
    x_TM[3] = torch.nan
    assert router(x_TM, context).logits_TE[3].isnan().all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("tokens, num_experts", [(400, 8), (30, 6)])
def test_the_plan_s_marginals_are_even(tokens: int, num_experts: int, spread: float):
    logits_UE = spread * torch.randn(tokens, num_experts) + torch.arange(num_experts)
    plan_UE = (logits_UE + sinkhorn_bias(logits_UE)).double().softmax(1) / tokens
    torch.testing.assert_close(num_experts * plan_UE.sum(0), torch.ones(num_experts).double(), rtol=1e-4, atol=0)


def test_the_plan_is_that_of_the_alternating_formula():
    logits_UE = torch.randn(50, 7, dtype=torch.float64)
    A_UE, d1_E = logits_UE.exp(), torch.ones(7, dtype=torch.float64)
    for _ in range(500):
        d0_U = 1 / (50 * (A_UE @ d1_E))
        d1_E = 1 / (7 * (A_UE.T @ d0_U))
    plan_UE = d0_U[:, None] * A_UE * d1_E
    actual_UE = (logits_UE + sinkhorn_bias(logits_UE)).softmax(1) / 50
    torch.testing.assert_close(actual_UE, plan_UE, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_the_plan_stands_any_logits(scale: float):
    logits_UE = scale * torch.randn(64, 8)
    assert sinkhorn_bias(logits_UE).isfinite().all()
    one_favourite = torch.zeros(64, 8)
    one_favourite[1:, 3] = scale
    assert sinkhorn_bias(one_favourite).isfinite().all()


@every_pool
@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_training_is_even_and_evaluation_greedy(name: str, pool: str):
    router, greedy = make_router((name, {"pool": pool}), num_experts=6), make_router(("top_k", {}), num_experts=6)
    greedy.load_state_dict(router.state_dict())
    context = make_context(8, 32)
    x_TM = skewed(context)
    everyone = torch.arange(256)
    trained, plain = (loads(r, x_TM, context, everyone).double() for r in (router, greedy))
    # Two choices out of six from one plan cannot be as even as the plan is.
    assert trained.max() / trained.mean() < 1.5 < plain.max() / plain.mean()
    assert torch.equal(router.eval()(x_TM, context).expert_ids_TK, greedy(x_TM, context).expert_ids_TK)


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_padding_is_routed_as_in_evaluation(name: str):
    router, context = make_router((name, {})), padded_context()
    x_TM = skewed(context)
    padding_T = ~context.valid_BL.flatten()
    trained = router(x_TM, context).expert_ids_TK
    evaluated = router.eval()(x_TM, context).expert_ids_TK
    assert torch.equal(trained[padding_T], evaluated[padding_T]) and not torch.equal(trained, evaluated)


@pytest.mark.parametrize("name", ["base", "sinkhorn", "expert_choice", "quantile"])
def test_recomputation_gives_the_same_gradients(name: str):
    router, context = make_router((name, {})), make_context()
    factors_T = torch.randn(12)

    def weighted(x_TM: Tensor) -> Tensor:
        decision = router(x_TM, context)
        return (decision.weights_TK * (decision.expert_ids_TK + 1)).sum(1) @ factors_T

    gradients = []
    for recompute in (False, True):
        x_TM = hidden_states(context).requires_grad_()
        loss = checkpoint(weighted, x_TM, use_reentrant=False) if recompute else weighted(x_TM)
        gradients.append(torch.autograd.grad(loss, [x_TM, *router.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_pool
def test_expert_choice_is_never_causal(pool: str):
    config = make_router(("expert_choice", {"pool": pool})).config
    assert not config.causal and config.varying_top_k


@pytest.mark.parametrize("name", ["base", "sinkhorn"])
def test_assignments_claim_causality_for_evaluation(name: str):
    config = make_router((name, {})).config
    assert config.causal and not config.varying_top_k


def test_an_expert_s_choice_depends_on_later_tokens():
    router, context = make_router(("expert_choice", {}), num_experts=4), make_context(1, 8)
    x_TM = hidden_states(context)
    changed_TM = torch.cat([x_TM[:4], 3 * x_TM[4:].flip(0)])
    before, after = (router(x, context) for x in (x_TM, changed_TM))
    used = [[sorted(set(row) - {-1}) for row in d.expert_ids_TK[:4].tolist()] for d in (before, after)]
    assert used[0] != used[1]


@pytest.mark.parametrize("tokens, num_experts, top_k", [(40, 8, 2), (7, 5, 4), (3, 6, 1), (1, 3, 2)])
def test_prices_are_the_quantiles(tokens: int, num_experts: int, top_k: int):
    logits_TE, beta_E = torch.randn(tokens, num_experts), torch.randn(num_experts)
    prices = quantile_prices(logits_TE, beta_E, top_k).tolist()
    assert prices == pytest.approx(naive_prices(logits_TE, beta_E.tolist(), top_k), abs=1e-5)


def test_quantile_evens_the_load_over_steps():
    """A population that all want the same experts, shown again in every step in two micro-batches."""
    router = make_router(("quantile", {}), num_experts=8)
    contexts = [make_context(16, 32, seed=seed) for seed in range(2)]
    micro_batches = [(hidden_states(c, seed=n) + 1.0, c) for n, c in enumerate(contexts)]
    violations = []
    for _ in range(12):
        counts = run_step(router, micro_batches).counts_E.double()
        violations.append(float(counts.max() / counts.mean() - 1))
    assert violations[0] > 1.0 and violations[-1] < 0.05
    assert router.beta_E.mean().abs() < 1e-6
    # Evaluation routes by the same prices.
    x_TM, context = micro_batches[0]
    trained = router(x_TM, context)
    assert_same_decision(router.eval()(x_TM, context), trained)


def test_quantile_averages_over_micro_batches_by_their_tokens():
    router, contexts = make_router(("quantile", {}), num_experts=8), [make_context(2, 8), padded_context()]
    micro_batches = [(hidden_states(context), context) for context in contexts]
    run_step(router, micro_batches)
    total, tokens = torch.zeros(8, dtype=torch.float64), 0
    for x_TM, context in micro_batches:
        valid_TM = x_TM if context.valid_T is None else x_TM[context.valid_T]
        prices = naive_prices(valid_TM @ router.scorer.weight.T, [0.0] * 8, 2)
        total, tokens = total + len(valid_TM) * torch.tensor(prices), tokens + len(valid_TM)
    expected_E = total / tokens
    torch.testing.assert_close(router.beta_E, (expected_E - expected_E.mean()).float())


def test_quantile_keeps_its_prices_in_a_step_without_tokens():
    router = make_router(("quantile", {}), num_experts=8)
    context = make_context()
    run_step(router, [(hidden_states(context), context)])
    before = router.beta_E.clone()
    run_step(router, [(hidden_states(context), replace(context, valid_BL=torch.zeros(3, 4, dtype=torch.bool)))])
    assert before.any() and torch.equal(router.beta_E, before)


def test_quantile_needs_something_to_choose():
    with pytest.raises(ValueError, match=r"quantile with model\.moe\.top_k 4, which is all of model\.moe\.num_experts"):
        make_router(("quantile", {}), top_k=4, num_experts=4)
