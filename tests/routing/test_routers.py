"""Every registered router against its per-token oracle: experts, weights, probabilities, logits and gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router
from tests.routing.cases import (
    Case,
    case_id,
    cases,
    cases_by_top_k,
    hidden_states,
    make_context,
    make_router,
    run_steps,
    same_decision,
)
from tests.routing.oracles import ORACLES, Problem, Token

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


def naive_decision(
    case: Case, router: Router, x_TM: Tensor, context: RoutingContext, parameters: dict[str, Tensor]
) -> RoutingDecision:
    """The oracle's routes of all tokens, in float64."""
    name, options = case
    assert name in ORACLES, f"router '{name}' has no oracle: add one to tests/routing/oracles.py"
    setting = router.setting
    problem = Problem(
        setting.num_experts,
        setting.top_k,
        setting.layer,
        setting.seed,
        setting.domain_weights,
        setting.token_counts_DV.tolist(),
        parameters,
        options,
        {name: buffer.clone() for name, buffer in router.named_buffers()},
        router.training,
    )
    bias_YE = context.selection_bias_YE
    bias = [0.0] * setting.num_experts if bias_YE is None else bias_YE[context.layer].tolist()
    B, L = context.token_ids_BL.shape
    assert context.document_BL is not None
    tokens = [
        Token(
            x_TM[b * L + l],
            int(context.token_ids_BL[b, l]),
            int(context.domain_BL[b, l]),
            int(context.sequence_B[b]),
            int(context.document_BL[b, l]),
            int(context.position_BL[b, l]),
            bias,
        )
        for b in range(B)
        for l in range(L)  # noqa: E741
    ]
    routes = ORACLES[name].route(tokens, problem)
    # Where tokens use different numbers of experts, the shorter choices are filled up.
    width = max(1, *(len(route.experts) for route in routes))
    zero = torch.zeros((), dtype=torch.float64)

    def scores(name: str) -> Tensor | None:
        values = [getattr(route, name) for route in routes]
        return None if values[0] is None else torch.stack([torch.stack(value) for value in values])

    return RoutingDecision(
        torch.tensor([route.experts + [NO_EXPERT] * (width - len(route.experts)) for route in routes]),
        torch.stack([torch.stack(route.weights + [zero] * (width - len(route.weights))) for route in routes]),
        scores("probabilities"),
        scores("logits"),
    )


def gradients(decision: RoutingDecision, leaves: list[Tensor]) -> list[Tensor]:
    """Of a fixed random sum over all that the decision carries."""
    total = torch.zeros((), dtype=torch.float64)
    generator = torch.Generator().manual_seed(13)
    for values in (decision.weights_TK, decision.probabilities_TE, decision.logits_TE):
        if values is not None and values.requires_grad:
            factors = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            finite = values.isfinite()
            total = total + (factors[finite] * values[finite]).sum()
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest expected number; infinities at the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert torch.equal(actual.isfinite(), expected.isfinite()), name
    finite = expected.isfinite()
    error = (actual[finite] - expected[finite]).abs().max()
    assert error <= tolerance * expected[finite].abs().max().clamp(min=1e-3), f"{name} is off by {error:g}"


def assert_matches_the_oracle(case: Case, router: Router, context: RoutingContext, dtype: torch.dtype) -> None:
    """Experts, weights, probabilities, logits, and the gradients of input and parameters."""
    x_TM = hidden_states(context, dtype).requires_grad_()
    # `frozen` has parameters that take no gradient.
    learned = {name: p for name, p in router.named_parameters() if p.requires_grad}
    actual = router(x_TM, context)

    naive_x_TM = x_TM.detach().double().requires_grad_()
    naive_parameters = {
        name: p.detach().double().requires_grad_(p.requires_grad) for name, p in router.named_parameters()
    }
    expected = naive_decision(case, router, naive_x_TM, context, naive_parameters)

    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    for name in ("weights_TK", "probabilities_TE", "logits_TE"):
        values, naive = getattr(actual, name), getattr(expected, name)
        assert (values is None) == (naive is None), name
        if values is not None:
            assert_close(name, values, naive, TOLERANCES[values.dtype])

    actual_gradients = gradients(actual, [x_TM, *learned.values()])
    expected_gradients = gradients(expected, [naive_x_TM, *(naive_parameters[name] for name in learned)])
    for name, gradient, naive in zip(["x_TM", *learned], actual_gradients, expected_gradients, strict=True):
        assert_close(f"gradient of {name}", gradient, naive, TOLERANCES[dtype])


def with_bias(context: RoutingContext, router: Router) -> RoutingContext:
    bias_YE = torch.randn(2, router.setting.num_experts, generator=torch.Generator().manual_seed(17))
    return replace(context, selection_bias_YE=bias_YE)


@pytest.mark.parametrize(
    "dtype, biased",
    [(torch.float64, False), (torch.float64, True), (torch.float32, True)],
    ids=["float64", "float64-biased", "float32-biased"],
)
@pytest.mark.parametrize("case, top_k", cases_by_top_k(1, 2, 5), ids=case_id)
def test_router_computes_its_formula(case: Case, top_k: int, dtype: torch.dtype, biased: bool):
    router, context = make_router(case, top_k).to(dtype), make_context()
    if biased:
        context = with_bias(context, router)
    assert_matches_the_oracle(case, router, context, dtype)


@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("case, top_k", cases_by_top_k(1, 2), ids=case_id)
def test_router_computes_its_formula_in_evaluation(case: Case, top_k: int, biased: bool):
    router, context = make_router(case, top_k).double(), make_context()
    if biased:
        context = with_bias(context, router)
    x_TM = hidden_states(context, torch.float64)
    in_training = router(x_TM, context)
    router.eval()
    if not same_decision(router(x_TM, context), in_training):
        assert_matches_the_oracle(case, router, context, torch.float64)


STATEFUL = [(case, top_k) for case, top_k in cases_by_top_k(1, 2) if [*make_router(case, top_k).buffers()]]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case, top_k", STATEFUL, ids=case_id)
def test_router_computes_its_formula_once_its_state_has_moved(case: Case, top_k: int, training: bool):
    router = make_router(case, top_k).double()
    before = {name: buffer.clone() for name, buffer in router.named_buffers()}
    run_steps(router, 4)
    if any(not torch.equal(buffer, before[name]) for name, buffer in router.named_buffers()):
        assert_matches_the_oracle(case, router.train(training), make_context(), torch.float64)


def test_states_do_move():
    """Otherwise the test above would say nothing."""
    for case in cases(["top_p", "expert_threshold"]):
        router = make_router(case)
        before = {name: value.clone() for name, value in router.state_dict().items()}
        run_steps(router, 2)
        assert all(
            not torch.equal(value, before[name]) for name, value in router.state_dict().items() if "scorer" not in name
        )


def test_the_selection_bias_moves_choices_and_not_weights():
    """Otherwise the biased half of the test above would say nothing."""
    router, context = make_router(("top_k", {"normalise": False})), make_context()
    x_TM = hidden_states(context)
    plain = router(x_TM, context)
    bias_YE = torch.zeros(2, router.setting.num_experts)
    bias_YE[:, 3] = 10.0
    biased = router(x_TM, replace(context, selection_bias_YE=bias_YE))
    assert (biased.expert_ids_TK[:, 0] == 3).all() and not (plain.expert_ids_TK[:, 0] == 3).all()
    assert torch.equal(biased.weights_TK[:, 0], plain.probabilities_TE[:, 3])


def test_only_what_is_learned_takes_gradients():
    assert [p.requires_grad for p in make_router(("frozen", {})).parameters()] == [False]
    assert [p.requires_grad for p in make_router(("top_k", {})).parameters()] == [True]
