"""What every router promises, whatever its formula."""

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.guard import checked
from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Capability
from tests.routing.cases import (
    DOMAIN_WEIGHTS,
    DOMAINS,
    HIDDEN,
    LENGTH,
    Case,
    assert_same_decision,
    case_id,
    cases,
    cases_by_top_k,
    hidden_states,
    make_context,
    make_router,
    rows,
    run_step,
    run_steps,
    single_domain_context,
    weight_would_be_one,
)

every_router = pytest.mark.parametrize("case", cases(), ids=case_id)
# 99.9 % points of chi-square, by degrees of freedom.
CHI_SQUARE = {3: 16.3, 9: 27.9, 15: 37.7}


def used(decision: RoutingDecision, chosen_T: Tensor) -> list[list[int]]:
    """Experts of some tokens, best first; the decision may be wider than any of them needs."""
    return [[e for e in experts if e != NO_EXPERT] for experts in decision.expert_ids_TK[chosen_T].tolist()]


@pytest.mark.parametrize("case", [case for case in cases() if weight_would_be_one(case)], ids=case_id)
def test_one_normalised_weight_is_refused(case: Case):
    with pytest.raises(ValueError, match=r"with model\.moe\.top_k 1: the only weight would always be 1"):
        make_router(case, top_k=1)


@pytest.mark.parametrize("case, top_k", cases_by_top_k(1, 2, 5), ids=case_id)
def test_choices_are_different_experts_with_finite_weights(case: Case, top_k: int):
    router, context = make_router(case, top_k), make_context(8, 8)
    decision = router(hidden_states(context), context)
    chosen = [[e for e in experts if e != -1] for experts in decision.expert_ids_TK.tolist()]
    assert all(len(set(experts)) == len(experts) for experts in chosen)
    assert all(0 <= e < router.setting.num_experts for experts in chosen for e in experts)
    assert decision.weights_TK.isfinite().all() and (decision.weights_TK >= 0).all()
    assert (decision.probabilities_TE is not None) == (Capability.SCORES in router.config.provides)
    if decision.probabilities_TE is not None:
        torch.testing.assert_close(decision.probabilities_TE.sum(-1), torch.ones(64))


@every_router
@pytest.mark.parametrize("position", range(1, LENGTH))
def test_a_causal_route_does_not_depend_on_later_tokens(case: Case, position: int):
    if not make_router(case).config.causal:
        pytest.skip("does not claim to be causal")
    router, context = make_router(case).eval(), make_context()
    run_steps(router, 2)
    B, L = context.token_ids_BL.shape
    x_BLM = hidden_states(context).view(B, L, HIDDEN)
    later_BL = torch.arange(L).expand(B, L) >= position
    changed = replace(
        context,
        token_ids_BL=torch.where(later_BL, (context.token_ids_BL + 1) % 50, context.token_ids_BL),
        domain_BL=torch.where(later_BL, (context.domain_BL + 1) % len(DOMAINS), context.domain_BL),
        document_BL=torch.where(later_BL, context.document_BL + 1, context.document_BL),
    )
    before = router(x_BLM.flatten(0, 1), context)
    after = router(torch.where(later_BL[..., None], -x_BLM, x_BLM).flatten(0, 1), changed)
    earlier_T = ~later_BL.reshape(-1)
    assert used(before, earlier_T) == used(after, earlier_T)
    # The widths may differ, and by choices without an expert only.
    width = min(before.weights_TK.shape[1], after.weights_TK.shape[1])
    torch.testing.assert_close(before.weights_TK[earlier_T, :width], after.weights_TK[earlier_T, :width])
    if case[0] != "random":
        assert not torch.equal(before.expert_ids_TK, after.expert_ids_TK) or "all" in case[1].values()


@every_router
def test_the_same_input_gives_the_same_decision(case: Case):
    router, context = make_router(case), make_context()
    x_TM = hidden_states(context)
    first = router(x_TM, context)
    torch.rand(10)
    assert_same_decision(router(x_TM, context), first)


@every_router
def test_a_restored_router_decides_the_same(case: Case):
    router, context = make_router(case), make_context()
    run_steps(router, 2)
    x_TM = hidden_states(context)
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    restored = make_router(case)
    restored.load_state_dict(torch.load(file))
    assert_same_decision(restored(x_TM, context), router(x_TM, context))


@pytest.mark.parametrize("case", [case for case in cases() if not make_router(case).config.learned], ids=case_id)
def test_prescribed_routes_do_not_depend_on_the_split_into_micro_batches(case: Case):
    router, context = make_router(case), make_context(6)
    x_TM = hidden_states(context)
    whole = router(x_TM, context)
    for size in (1, 2, 3):
        for first in range(0, 6, size):
            tokens = slice(first * LENGTH, (first + size) * LENGTH)
            part = router(x_TM[tokens], rows(context, slice(first, first + size)))
            assert torch.equal(part.expert_ids_TK, whole.expert_ids_TK[tokens])
            torch.testing.assert_close(part.weights_TK, whole.weights_TK[tokens])


@every_router
@pytest.mark.parametrize("mode", ["cast", "autocast"])
def test_routing_is_in_float32_under_bfloat16(case: Case, mode: str):
    """Inputs and parameters are rounded to bfloat16; the decision is that of float32 on the rounded ones."""
    router, context = make_router(case), make_context(40)
    run_steps(router, 2)
    low_TM = hidden_states(context, torch.bfloat16)
    exact = make_router(case)
    exact.load_state_dict(router.state_dict())
    if mode == "cast":
        # Parameters only: buffers keep their dtype.
        exact.load_state_dict(
            {name: value.detach().bfloat16() for name, value in router.named_parameters()}, strict=False
        )
        actual = router.bfloat16()(low_TM, context)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            actual = router(low_TM, context)
    assert actual.weights_TK.dtype == torch.float32
    assert_same_decision(actual, exact(low_TM.float(), context))


@every_router
def test_state_changes_between_steps_only(case: Case):
    """A routing pass ahead and recomputation must see what the micro-batch saw."""
    router, context = make_router(case), make_context()
    run_steps(router, 2)
    x_TM = hidden_states(context)
    first = router(x_TM, context)
    router.observe(first, context)
    assert_same_decision(router(x_TM, context), first)


@every_router
def test_nothing_of_a_finished_step_is_left_over(case: Case):
    """What a step accumulates is in no checkpoint: a router that still had some would go on unlike a restored one."""
    router, restored = make_router(case), make_router(case)
    run_steps(router, 2)
    restored.load_state_dict(router.state_dict())
    run_steps(router, 1)
    run_steps(restored, 1)
    for name, value in restored.state_dict().items():
        assert torch.equal(value, router.state_dict()[name]), name


@every_router
def test_what_padding_holds_changes_nothing(case: Case):
    context = make_context(6, 8)
    valid_BL = torch.rand(6, 8) < 0.7
    valid_BL[4] = False
    context, valid_T = replace(context, valid_BL=valid_BL), valid_BL.flatten()
    x_TM = hidden_states(context)
    other_TM = torch.where(valid_T[:, None], x_TM, 30 * torch.randn_like(x_TM))
    routers = [make_router(case), make_router(case)]
    routers[1].load_state_dict(routers[0].state_dict())
    for _ in range(2):
        one, other = (router(x, context) for router, x in zip(routers, (x_TM, other_TM), strict=True))
        assert used(one, valid_T) == used(other, valid_T)
        for router, x in zip(routers, (x_TM, other_TM), strict=True):
            run_step(router, [(x, context)])
        for name, value in routers[0].state_dict().items():
            torch.testing.assert_close(value, routers[1].state_dict()[name])


@every_router
def test_capabilities_are_there(case: Case):
    router, context = make_router(case), make_context(8, 8)
    provides, E = router.config.provides, router.setting.num_experts
    x_TM = hidden_states(context)
    decision = router(x_TM, context)
    assert (
        (decision.probabilities_TE is not None) == (decision.logits_TE is not None) == (Capability.SCORES in provides)
    )
    assert (decision.vectors_EX is not None) == (Capability.VECTORS in provides)
    assert (decision.noise is not None) == (Capability.NOISE in provides)
    if decision.vectors_EX is not None:
        assert len(decision.vectors_EX) == E
        assert any(decision.vectors_EX is parameter for parameter in router.parameters())
    if decision.noise is not None:
        assert (decision.noise.scale_TE > 0).all()
        assert decision.noise.clean_TE.shape == (64, E)
        assert router.eval()(x_TM, context).noise is None
        router.train()
    if Capability.RELU_GATES in provides:
        assert decision.logits_TE is not None
        sums_T = decision.logits_TE.relu().sum(-1)
        torch.testing.assert_close(decision.weights_TK.sum(-1), sums_T)
    bias_YE = 10 * torch.randn(2, E)
    biased = router(x_TM, replace(context, selection_bias_YE=bias_YE))
    moved = not torch.equal(biased.expert_ids_TK, decision.expert_ids_TK)
    assert moved == (Capability.SELECTION_BIAS in provides)


@every_router
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_only_routers_that_say_so_vary_the_number_of_experts(case: Case, training: bool):
    router, context = make_router(case).train(training), make_context(8, 8)
    run_steps(router, 2)
    ids_TK = router(hidden_states(context), context).expert_ids_TK
    if not router.config.varying_top_k:
        assert ids_TK.shape == (64, 2) and (ids_TK != NO_EXPERT).all()


def chi_square(counts: Tensor, expected: Tensor) -> float:
    return float(((counts - expected).square() / expected).sum())


def random_experts(context: RoutingContext, top_k: int = 2, **setting: int) -> Tensor:
    router = make_router(("random", {}), top_k, num_experts=16, **setting)
    return router(hidden_states(context), context).expert_ids_TK


def test_random_is_uniform_in_every_choice():
    experts_TK = random_experts(make_context(64, 128))
    for choice in range(2):
        counts = torch.bincount(experts_TK[:, choice], minlength=16).double()
        assert chi_square(counts, torch.full_like(counts, 64 * 128 / 16)) < CHI_SQUARE[15]
    followed = experts_TK[experts_TK[:, 0] == 5, 1]
    counts = torch.bincount(followed, minlength=16).double()[torch.arange(16) != 5]
    assert chi_square(counts, torch.full_like(counts, len(followed) / 15)) < CHI_SQUARE[15]


def test_random_draws_afresh_for_every_layer_seed_and_sequence():
    """Two independent draws agree on the first choice for one token in 16."""
    context = make_context(32, 64)
    first = random_experts(context)[:, 0]
    later = replace(context, sequence_B=context.sequence_B + 1_000)
    others = {
        "layer": random_experts(context, layer=2),
        "seed": random_experts(context, seed=8),
        "sequence": random_experts(later),
        "position": random_experts(replace(context, position_BL=context.position_BL + 64)),
    }
    expected, deviation = 1 / 16, (1 / 16 * 15 / 16 / 2048) ** 0.5
    for name, other in others.items():
        agreement = float((first == other[:, 0]).double().mean())
        assert abs(agreement - expected) < 4 * deviation, name


def permuted_groups(context: RoutingContext, inside: str = "hash", **setting: int) -> Tensor:
    """Group of every token, [B, L]; the groups are of six experts each."""
    router = make_router(("permuted_reference", {"inside": inside}), **setting)
    groups_TK = router(hidden_states(context), context).expert_ids_TK // 6
    assert (groups_TK == groups_TK[:, :1]).all()
    return groups_TK[:, 0].view_as(context.token_ids_BL)


def test_permuted_groups_follow_the_domain_weights_and_know_nothing_of_the_domain():
    context = single_domain_context(4000)
    group_B, domain_B = permuted_groups(context)[:, 0], context.domain_BL[:, 0]
    table_DJ = torch.zeros(4, 4, dtype=torch.float64)
    table_DJ.index_put_((domain_B, group_B), torch.ones(4000, dtype=torch.float64), accumulate=True)
    expected = 4000 * torch.tensor(DOMAIN_WEIGHTS, dtype=torch.float64)
    assert chi_square(table_DJ.sum(0), expected) < CHI_SQUARE[3]

    joint = table_DJ / table_DJ.sum()
    independent = joint.sum(1, keepdim=True) * joint.sum(0)
    information = float((joint * (joint / independent).log()).sum())
    # Of N independent pairs, 2 N times the empirical mutual information is distributed like chi-square.
    assert 2 * 4000 * information < CHI_SQUARE[9]


@pytest.mark.parametrize("inside", ["learned", "hash"])
def test_tokens_of_one_sequence_and_label_share_a_permuted_group(inside: str):
    context = make_context(200, 8)
    group_BL = permuted_groups(context, inside)
    group_of: dict[tuple[int, int], set[int]] = {}
    for sequence, domains, groups in zip(
        context.sequence_B.tolist(), context.domain_BL.tolist(), group_BL.tolist(), strict=True
    ):
        for domain, group in zip(domains, groups, strict=True):
            group_of.setdefault((sequence, domain), set()).add(group)
    assert all(len(groups) == 1 for groups in group_of.values())
    assert {group for groups in group_of.values() for group in groups} == {0, 1, 2, 3}


def test_permuted_groups_are_the_same_in_all_layers_and_differ_between_seeds():
    context = single_domain_context(500)
    groups = permuted_groups(context)
    assert torch.equal(groups, permuted_groups(context, layer=0))
    assert not torch.equal(groups, permuted_groups(context, seed=8))


@pytest.mark.parametrize("groups", ["equal", "proportional"])
@pytest.mark.parametrize("inside", ["learned", "hash"])
def test_reference_uses_the_domains_own_experts_only(groups: str, inside: str):
    """The sizes for 24 experts and weights 0.4, 0.3, 0.2, 0.1 are written out."""
    sizes = {"equal": [6, 6, 6, 6], "proportional": [10, 7, 5, 2]}[groups]
    owner_E = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    router, context = make_router(("reference", {"groups": groups, "inside": inside})), make_context(50)
    # A bias that prefers the experts of other domains must not open them.
    context = replace(context, selection_bias_YE=torch.randn(2, 24).mul(100))
    decision = router(hidden_states(context), context)
    domain_T = context.domain_BL.reshape(-1)
    assert (owner_E[decision.expert_ids_TK] == domain_T[:, None]).all()
    if decision.probabilities_TE is not None:
        assert (decision.probabilities_TE[owner_E[None] != domain_T[:, None]] == 0).all()


def test_reference_sends_gradients_into_the_domains_own_rows_only():
    router, context = make_router(("reference", {})), make_context()
    context = replace(context, domain_BL=torch.full_like(context.domain_BL, 2))
    decision = router(hidden_states(context), context)
    assert decision.probabilities_TE is not None and decision.logits_TE is not None
    factors = torch.randn(24)
    loss = (
        (decision.weights_TK * factors[:2]).sum()
        + (decision.probabilities_TE * factors).sum()
        + decision.logits_TE.logsumexp(-1).square().sum()
    )
    loss.backward()
    (weight_EM,) = router.parameters()
    assert weight_EM.grad is not None
    reached_E = weight_EM.grad.abs().sum(-1) > 0
    assert reached_E.tolist() == [12 <= e < 18 for e in range(24)]


def test_reference_needs_enough_experts():
    with pytest.raises(ValueError, match=r"4 groups with at least 3 experts each need 12 .*there are 10; raise"):
        make_router(("reference", {}), top_k=3, num_experts=10)


def test_reference_uses_all_experts_of_a_group_only_if_each_group_has_top_k():
    message = r"inside: all .* groups have 6 to 6 experts and a token uses 2; change .* so that there are 8, or"
    with pytest.raises(ValueError, match=message):
        make_router(("reference", {"inside": "all"}), top_k=2, num_experts=24)


@every_router
def test_hidden_states_that_are_not_finite_give_a_decision_that_can_be_carried_out(case: Case):
    """In training the ranks go on to the loss, by which all see it."""
    router, context = make_router(case), make_context()
    num_experts, tokens = router.setting.num_experts, context.token_ids_BL.numel()
    x_TM = hidden_states(context)
    for sick in (
        x_TM * float("nan"),
        x_TM * float("inf"),
        torch.where(torch.arange(tokens)[:, None] < 1, float("nan"), x_TM),
    ):
        found = router.train()(sick, context)
        decision = checked(found, num_experts, router.setting.top_k, tokens, router.config, context, training=True)
        assert ((decision.expert_ids_TK >= -1) & (decision.expert_ids_TK < num_experts)).all()
        assert decision.weights_TK.isnan().any() or decision.probabilities_TE is None
