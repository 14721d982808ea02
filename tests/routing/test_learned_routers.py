"""What single routers promise beyond their formula: noise, groups, scales, and control of how many experts are used."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.records import NO_EXPERT, LayerStep, RoutingContext, RoutingDecision
from moe_testbed.routing.routers.expert_threshold import upper_quantile
from moe_testbed.routing.routers.noisy_top_k import NoisyTopK
from moe_testbed.routing.routers.relu import shares_of_gates
from moe_testbed.routing.routers.top_p import select_top_p
from tests.routing.cases import (
    HIDDEN,
    LENGTH,
    Case,
    case_id,
    hidden_states,
    make_context,
    make_router,
    rows,
    run_step,
    run_steps,
)

# 99.9 % point of chi-square with 19 degrees of freedom.
CHI_SQUARE_19 = 43.8


def noise_TE(context: RoutingContext, **setting: int) -> Tensor:
    """The draws of `noisy_top_k`, as its decision carries them."""
    router = make_router(("noisy_top_k", {}), **setting)
    decision = router(hidden_states(context), context)
    assert decision.noise is not None and decision.logits_TE is not None
    return ((decision.logits_TE - decision.noise.clean_TE).double() / decision.noise.scale_TE).detach()


def test_noise_is_normal():
    draws = noise_TE(make_context(32, 64)).flatten()
    edges = torch.special.ndtri(torch.arange(1, 20, dtype=torch.float64) / 20)
    counts = torch.bincount(torch.bucketize(draws, edges), minlength=20).double()
    expected = len(draws) / 20
    assert float(((counts - expected).square() / expected).sum()) < CHI_SQUARE_19
    assert 3.5 < draws.abs().max() < 5.5


def test_noise_is_independent_of_experts_tokens_layers_seeds_and_sequences():
    context = make_context(16, 64)
    first = noise_TE(context)
    others = {
        "next expert": first.roll(1, 1),
        "next token": first.roll(1, 0),
        "layer": noise_TE(context, layer=2),
        "seed": noise_TE(context, seed=8),
        "sequence": noise_TE(replace(context, sequence_B=context.sequence_B + 1_000)),
        "position": noise_TE(replace(context, position_BL=context.position_BL + 64)),
    }
    for name, other in others.items():
        # The mean product of N independent pairs from N(0, 1) has the standard deviation 1 / sqrt(N).
        assert abs(float((first * other).mean())) < 4 * first.numel() ** -0.5, name


def test_noise_does_not_depend_on_the_split_into_micro_batches():
    router, context = make_router(("noisy_top_k", {})), make_context(6)
    assert isinstance(router, NoisyTopK)
    whole_TE = router.draws_TE(context, torch.float32)
    for size in (1, 2, 3):
        for first in range(0, 6, size):
            part_TE = router.draws_TE(rows(context, slice(first, first + size)), torch.float32)
            assert torch.equal(part_TE, whole_TE[first * LENGTH : (first + size) * LENGTH])


def test_evaluation_has_no_noise():
    router, context = make_router(("noisy_top_k", {})).eval(), make_context()
    plain = make_router(("top_k", {}))
    plain.load_state_dict({"scorer.weight": router.state_dict()["scorer.weight"]})
    x_TM = hidden_states(context)
    decision = router(x_TM, context)
    assert decision.noise is None
    assert torch.equal(decision.expert_ids_TK, plain(x_TM, context).expert_ids_TK)
    assert torch.equal(decision.weights_TK, plain(x_TM, context).weights_TK)


def test_noise_starts_equal_for_all_and_is_learned():
    context = make_context()
    router = fresh(("noisy_top_k", {}))
    decision = router(hidden_states(context), context)
    assert decision.noise is not None
    torch.testing.assert_close(decision.noise.scale_TE, torch.full((12, 24), math.log(2)))
    decision.weights_TK[:, 0].sum().backward()
    gradient = router.get_parameter("noise_scorer.weight").grad
    assert gradient is not None and gradient.any()


def fresh(case: Case, top_k: int = 2) -> torch.nn.Module:
    """A router with its own initial parameters."""
    router = make_router(case, top_k)
    return type(router)(router.config, router.setting)


@pytest.mark.parametrize("group_score", ["max", "top_sum"])
@pytest.mark.parametrize("affinity", ["softmax", "sigmoid"])
def test_a_token_stays_in_the_groups_kept(affinity: str, group_score: str):
    options = {"groups": 8, "groups_kept": 2, "group_score": group_score, "affinity": affinity}
    router, context = make_router(("group_limited", options), top_k=5), make_context(20)
    context = replace(context, selection_bias_YE=torch.randn(2, 24))
    groups_TK = router(hidden_states(context), context).expert_ids_TK // 3
    assert max(len(set(groups)) for groups in groups_TK.tolist()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 5}, r"groups is 5, but model\.moe\.num_experts is 24, which 5 does not divide; choose a divisor"),
        ({"groups": 2, "groups_kept": 3}, r"groups_kept is 3, but there are 2 groups .*; keep at most 2"),
        (
            {"groups": 12, "groups_kept": 2},
            r"groups_kept is 2, but 2 groups of 2 experts are fewer than model\.moe\.top_k 5; keep at least 3 groups",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        make_router(("group_limited", options), top_k=5)


def test_cosine_scores_do_not_depend_on_lengths_and_stay_below_100():
    router, context = make_router(("cosine", {})).double(), make_context()
    x_TM = hidden_states(context, torch.float64)
    logits_TE = router(x_TM, context).logits_TE
    with torch.no_grad():
        router.get_parameter("scorer.weight").mul_(7.0)
    torch.testing.assert_close(router(30 * x_TM, context).logits_TE, logits_TE)
    with torch.no_grad():
        router.get_parameter("scorer.log_scale").fill_(50.0)
    largest = router(x_TM, context).logits_TE.abs().max().item()
    assert 50 < largest <= 100 * (1 + 1e-12)


def test_relu_starts_with_nearly_all_gates_open():
    for top_k in (1, 2):
        router, context = fresh(("relu", {}), top_k), make_context(40, 8)
        decision = router(hidden_states(context), context)
        share = (decision.expert_ids_TK != NO_EXPERT).sum() / (320 * 24)
        assert 0.95 < share < 1.0
        # E independent outputs with these weights add up to the length of one.
        assert decision.weights_TK.square().sum(-1).mean().item() == pytest.approx(1.25, rel=0.1)


def test_a_token_without_an_open_gate_uses_no_expert_and_looks_uniform():
    router, context = make_router(("relu", {})), make_context()
    with torch.no_grad():
        router.get_parameter("scorer.offset").fill_(-1e3)
    decision = router(hidden_states(context), context)
    assert (decision.expert_ids_TK == NO_EXPERT).all() and (decision.weights_TK == 0).all()
    assert decision.probabilities_TE is not None
    torch.testing.assert_close(decision.probabilities_TE, torch.full((12, 24), 1 / 24))


@pytest.mark.parametrize("gate", [0.0, 1e-30, 1e-8, 1e-3])
def test_shares_of_small_gates_have_finite_gradients(gate: float):
    gates_TE = torch.tensor([[gate, 0.0, 0.0], [1.0, 3.0, 0.0]], requires_grad=True)
    shares_TE = shares_of_gates(gates_TE)
    torch.testing.assert_close(shares_TE.sum(-1), torch.ones(2))
    torch.testing.assert_close(shares_TE[1], torch.tensor([0.25, 0.75, 0.0]))
    (gradient_TE,) = torch.autograd.grad((shares_TE * torch.randn(2, 3)).sum(), gates_TE)
    assert gradient_TE.isfinite().all()


def test_top_p_takes_the_smallest_set():
    p_TE = torch.tensor([[0.5, 0.3, 0.2], [0.25, 0.25, 0.5], [0.05, 0.9, 0.05]])
    for tau, expected in {
        1e-4: [[0], [2], [1]],
        0.5: [[0], [2], [1]],
        0.75: [[0, 1], [2, 0], [1, -1]],
        0.9: [[0, 1, 2], [2, 0, 1], [1, -1, -1]],
    }.items():
        assert select_top_p(p_TE, torch.tensor(tau)).tolist() == expected


def mean_used(steps: list[LayerStep]) -> float:
    """Experts per token."""
    return float(sum(step.counts_E.sum() for step in steps) / sum(step.tokens for step in steps))


CONTROLLED: list[Case] = [
    ("top_p", {}),
    ("top_p", {"rate": 0.5}),
    ("expert_threshold", {}),
    ("expert_threshold", {"decay": 0.98}),
]


@pytest.mark.parametrize("scale", [0.02, 1.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("case", CONTROLLED, ids=case_id)
def test_tokens_use_top_k_experts_on_average(case: Case, top_k: int, scale: float):
    router = make_router(case, top_k)
    with torch.no_grad():
        router.get_parameter("scorer.weight").mul_(scale)
    steps = run_steps(router, 60, sequences=32, length=16)
    assert mean_used(steps[-20:]) == pytest.approx(top_k, rel=0.05)


def test_top_p_leaves_tau_alone_at_rate_0_and_inside_0_and_1_elsewhere():
    router = make_router(("top_p", {"rate": 0.0}))
    run_steps(router, 3)
    assert router.get_buffer("tau").item() == pytest.approx(2 / 24)
    for top_k in (1, 24):
        router = make_router(("top_p", {"rate": 100.0}), top_k)
        for _ in range(3):
            run_steps(router, 1)
            assert 0 < router.get_buffer("tau") < 1


def test_thresholds_even_out_the_load_without_a_balancer():
    """top-k of the same scores is far from even."""

    def busiest(name: str) -> float:
        steps = run_steps(make_router((name, {})), 60)[30:]
        counts_E = sum(step.counts_E for step in steps)
        assert isinstance(counts_E, Tensor)
        return float(counts_E.max() / counts_E.double().mean())

    assert busiest("expert_threshold") < 1.15 < 1.5 < busiest("top_k")


def test_thresholds_need_a_first_step():
    router, context = make_router(("expert_threshold", {})), make_context()
    assert (router(hidden_states(context), context).expert_ids_TK != NO_EXPERT).all()
    x_TM, long = hidden_states(make_context(8, 8)), make_context(8, 8)
    decision = router(x_TM, long)
    run_step(router, [(x_TM, long)])
    assert decision.probabilities_TE is not None
    quantile_E = decision.probabilities_TE.double().quantile(1 - 2 / 24, dim=0)
    torch.testing.assert_close(router.get_buffer("thresholds_E"), quantile_E, rtol=1e-6, atol=0)


def test_thresholds_are_a_moving_average_over_steps():
    router = make_router(("expert_threshold", {"decay": 0.6}))
    expected_E = torch.zeros(24, dtype=torch.float64)
    # The newest of n steps weighs 1 / n, and never less than 1 - decay.
    for n, newest in enumerate([1.0, 0.5, 0.4, 0.4]):
        probabilities_TE = torch.rand(10, 24).softmax(-1)
        router.observe(
            RoutingDecision(torch.zeros(10, 1), torch.zeros(10, 1), probabilities_TE), make_context(2, 5 + n)
        )
        router.finish_step(LayerStep(torch.zeros(24), torch.tensor(10), lambda values: values))
        expected_E += newest * (probabilities_TE.double().quantile(1 - 2 / 24, dim=0) - expected_E)
        torch.testing.assert_close(router.get_buffer("thresholds_E"), expected_E, rtol=1e-6, atol=0)


def test_thresholds_of_ranks_are_averaged_by_their_tokens():
    """Two ranks with 8 and 24 tokens; one rank's router sees the mean over both."""
    first, second = make_router(("expert_threshold", {})), make_router(("expert_threshold", {}))
    second.load_state_dict(first.state_dict())
    contexts = [make_context(2), make_context(6)]
    quantiles = []
    for router, context in zip((first, second), contexts, strict=True):
        decision = router(hidden_states(context), context)
        router.observe(decision, context)
        quantiles.append(upper_quantile(decision.probabilities_TE, 2 / 24).double())
    sums = iter([(first.get_buffer(name) + second.get_buffer(name)) / 2 for name in ("quantile_sum_E", "tokens")])
    first.finish_step(LayerStep(torch.zeros(24), torch.tensor(32), lambda values: next(sums)))
    expected_E = (8 * quantiles[0] + 24 * quantiles[1]) / 32
    torch.testing.assert_close(first.get_buffer("thresholds_E"), expected_E)


@pytest.mark.parametrize("tokens", [1, 2, 5, 64])
@pytest.mark.parametrize("share", [1 / 24, 0.3, 1.0])
def test_the_quantile_is_torch_s(tokens: int, share: float):
    values_TE = torch.rand(tokens, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(upper_quantile(values_TE, share), values_TE.quantile(1 - share, dim=0))
