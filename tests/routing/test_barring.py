"""Barred experts: never used, and the others as if those were not there. Over all registered routers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.layer import without_barred
from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Capability, Router, Scores
from tests.routing.cases import (
    LAYER,
    Case,
    assert_same_decision,
    case_id,
    cases,
    hidden_states,
    make_context,
    make_router,
    run_steps,
)

SCORING = [case for case in cases() if Capability.SCORES in ROUTERS.get(case[0]).Config(**case[1]).provides]


def barred_YBE(context: RoutingContext, num_experts: int, share: float) -> Tensor:
    """Other experts for every sequence; nothing in the layers that are not asked."""
    generator = torch.Generator().manual_seed(17)
    barred = torch.zeros(LAYER + 1, len(context.token_ids_BL), num_experts, dtype=torch.bool)
    barred[LAYER] = torch.rand(barred.shape[1:], generator=generator) < share
    return barred


def trained(case: Case) -> Router:
    """In evaluation, after the steps that some routers need before they route as they will."""
    router = make_router(case)
    run_steps(router, 3)
    return router.eval()


def decide(router: Router, context: RoutingContext) -> RoutingDecision:
    with torch.no_grad():
        decision = router(hidden_states(context), context)
    return decision if context.barred_TE is None else without_barred(decision, context.barred_TE)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_no_barred_expert_is_used_and_no_bias_brings_it_back(case: Case, share: float) -> None:
    router, context = trained(case), make_context()
    E = router.setting.num_experts
    barred = barred_YBE(context, E, share)
    context = replace(context, barred_YBE=barred, selection_bias_YE=100.0 * barred.any(1).float())
    decision = decide(router, context)
    for t, experts in enumerate(decision.expert_ids_TK.tolist()):
        allowed = ~barred[LAYER, t // context.token_ids_BL.shape[1]]
        assert all(allowed[e] for e in experts if e != NO_EXPERT)
    assert decision.weights_TK.isfinite().all()
    assert not decision.weights_TK[decision.expert_ids_TK == NO_EXPERT].any()
    if share == 1.0:
        assert (decision.expert_ids_TK == NO_EXPERT).all()


@pytest.mark.parametrize("case", cases(), ids=case_id)
def test_barring_nothing_changes_nothing(case: Case) -> None:
    router, context = trained(case), make_context()
    nothing = barred_YBE(context, router.setting.num_experts, 0.0)
    assert_same_decision(decide(router, replace(context, barred_YBE=nothing)), decide(router, context))


@pytest.mark.parametrize("case", SCORING, ids=case_id)
def test_the_others_are_routed_as_if_the_barred_were_not_there(case: Case) -> None:
    """As by the same router with logits of -inf, which has no part in barring."""
    router, context = trained(case), make_context()
    barred = barred_YBE(context, router.setting.num_experts, 0.2)
    decision = decide(router, replace(context, barred_YBE=barred))
    barred_TE = barred[LAYER].repeat_interleave(context.token_ids_BL.shape[1], dim=0)
    scorer = router.get_submodule("scorer")
    scorer.register_forward_hook(lambda module, inputs, logits_TE: logits_TE.masked_fill(barred_TE, float("-inf")))
    expected = decide(router, context)
    assert expected.logits_TE is not None
    # Where too few are left, places are filled at weight 0 by experts that the token cannot use.
    unused_TK = expected.logits_TE.gather(1, expected.expert_ids_TK.clamp(min=0)) == float("-inf")
    expected_ids_TK = expected.expert_ids_TK.masked_fill(unused_TK, NO_EXPERT)
    for t, (mine, theirs) in enumerate(zip(decision.expert_ids_TK.tolist(), expected_ids_TK.tolist(), strict=True)):
        chosen = [e for e in theirs if e != NO_EXPERT]
        assert [e for e in mine if e != NO_EXPERT] == chosen
        for e in chosen:
            weight, oracle = decision.weights_TK[t, mine.index(e)], expected.weights_TK[t, theirs.index(e)]
            torch.testing.assert_close(weight, oracle)
    torch.testing.assert_close(decision.probabilities_TE, expected.probabilities_TE)


@pytest.mark.parametrize("name", ["top_k", "sigmoid", "top_k_softmax", "reference"])
def test_the_next_best_is_chosen_under_a_bias(name: str) -> None:
    """By a loop over the tokens: the K highest affinities plus bias among those left."""
    router, context = trained((name, {})), make_context()
    E, K = router.setting.num_experts, router.setting.top_k
    barred = barred_YBE(context, E, 0.3)
    bias_YE = 0.3 * torch.rand(LAYER + 1, E, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits_TE = router(hidden_states(context), context).logits_TE
    decision = decide(router, replace(context, barred_YBE=barred, selection_bias_YE=bias_YE))
    for t, logits_E in enumerate(logits_TE.tolist()):
        left = [e for e in range(E) if logits_E[e] > -1e30 and not barred[LAYER, t // context.token_ids_BL.shape[1], e]]
        z = torch.tensor([logits_E[e] for e in left], dtype=torch.float64)
        affinity = z if name == "top_k_softmax" else z.sigmoid() if name == "sigmoid" else z.exp() / z.exp().sum()
        worth = {e: float(a + bias_YE[LAYER, e]) for e, a in zip(left, affinity, strict=True)}
        best = sorted(worth, key=lambda e: -worth[e])[:K]
        assert [e for e in decision.expert_ids_TK[t].tolist() if e != NO_EXPERT] == best


def test_barred_scores_are_those_of_the_rest() -> None:
    """Softmax over the rest, sigmoids of the rest; a token with nothing left keeps what it has."""
    logits_TE = torch.tensor([[1.0, 2.0, 3.0], [3.0, 1.0, 0.0], [0.5, 0.0, 1.0]])
    barred_TE = torch.tensor([[False, False, True], [True, False, True], [True, True, True]])
    soft = Scores.by_softmax(logits_TE).without(barred_TE)
    e = torch.e
    expected = torch.tensor([[1 / (1 + e), e / (1 + e), 0.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(soft.probabilities_TE[:2], expected)
    assert torch.equal(soft.probabilities_TE[2], Scores.by_softmax(logits_TE).probabilities_TE[2])
    gates = Scores.by_sigmoid(logits_TE).without(barred_TE)
    assert torch.equal(gates.affinity_TE[:2], logits_TE.sigmoid()[:2].masked_fill(barred_TE[:2], 0.0))
    offered = soft.for_selection().affinity_TE
    assert torch.equal(offered[:2] == float("-inf"), barred_TE[:2])
