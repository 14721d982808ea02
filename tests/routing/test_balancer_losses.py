"""Every registered balancer: its loss and gradients against a loop, padding, precision and resuming.

Balancers enter by being registered; one with a loss needs an oracle in `naive_losses.py`.
"""

import io
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from moe_testbed.routing.balance import balancers
from moe_testbed.routing.balance.balancer import BALANCERS, Balancer, BalancerConfig
from moe_testbed.routing.balance.balancers.entropy import normalised_entropy
from moe_testbed.routing.balance.balancers.importance import squared_variation
from moe_testbed.routing.balance.balancers.l1_sparsity import L1Sparsity
from moe_testbed.routing.balance.balancers.load import chance_of_choice
from moe_testbed.routing.balance.balancers.orthogonality import orthogonality
from moe_testbed.routing.balance.balancers.similarity_preserving import similarity_preserving
from moe_testbed.routing.balance.balancing import BalanceTerms, Balancing
from moe_testbed.routing.balance.means import MeansBalancerConfig
from moe_testbed.routing.records import NO_EXPERT, Noise, RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Scope, ScopeConfig
from tests.routing.cases import make_context
from tests.routing.naive_balance import NaiveLayer, sets_of
from tests.routing.naive_losses import ORACLES, Routed

assert balancers.__all__

LAYERS, SEQUENCES, LENGTH, E, K, M = 2, 3, 4, 5, 3, 6
# The factor is one that float32 holds exactly.
T, FACTOR = SEQUENCES * LENGTH, 0.25
WITH_LOSS = [name for name in BALANCERS.names() if BALANCERS.get(name).loss is not Balancer.loss]
NOT_LINEAR = [name for name in BALANCERS.names() if issubclass(BALANCERS.get(name).Config, MeansBalancerConfig)]


@dataclass
class Leaves:
    """What one layer's routing is made from."""

    clean_TE: Tensor
    scale_TE: Tensor
    vectors_EX: Tensor
    outputs_TKM: Tensor
    expert_ids_TK: Tensor
    draw_TE: Tensor

    def differentiable(self) -> list[Tensor]:
        return [self.clean_TE, self.scale_TE, self.vectors_EX, self.outputs_TKM]

    def copy(self, dtype: torch.dtype) -> "Leaves":
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in self.differentiable()]
        return Leaves(*leaves, expert_ids_TK=self.expert_ids_TK, draw_TE=self.draw_TE.to(dtype))

    def decision(self) -> RoutingDecision:
        logits_TE = self.clean_TE + self.draw_TE * self.scale_TE
        probabilities_TE = logits_TE.softmax(-1)
        unused_TK = self.expert_ids_TK == NO_EXPERT
        weights_TK = probabilities_TE.gather(1, self.expert_ids_TK.clamp(min=0)).masked_fill(unused_TK, 0.0)
        noise = Noise(self.clean_TE, self.scale_TE)
        return RoutingDecision(self.expert_ids_TK, weights_TK, probabilities_TE, logits_TE, self.vectors_EX, noise)


def draw_leaves() -> Leaves:
    clean_TE, scale_TE = torch.randn(T, E, dtype=torch.float64), torch.rand(T, E, dtype=torch.float64) + 0.5
    draw_TE = torch.randn(T, E, dtype=torch.float64)
    expert_ids_TK = (clean_TE + draw_TE * scale_TE).topk(K).indices
    expert_ids_TK[:, -1].masked_fill_(torch.rand(T) < 0.3, NO_EXPERT)
    expert_ids_TK[1, 1:], expert_ids_TK[5] = NO_EXPERT, NO_EXPERT
    outputs_TKM = torch.randn(T, K, M, dtype=torch.float64).masked_fill(expert_ids_TK[..., None] == NO_EXPERT, 0.0)
    vectors_EX = torch.randn(E, M, dtype=torch.float64) / 2
    return Leaves(clean_TE, scale_TE, vectors_EX, outputs_TKM, expert_ids_TK, draw_TE)


def draw_context(padded: bool) -> RoutingContext:
    context = replace(make_context(SEQUENCES, LENGTH), document_BL=torch.tensor([[0, 0, 1, 0], [1] * 4, [2, 3, 3, 3]]))
    return replace(
        context, valid_BL=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).bool() if padded else None
    )


def scopes_of(name: str) -> list[str | None]:
    """Scopes that a balancer takes; None for one without."""
    if not issubclass(BALANCERS.get(name).Config, ScopeConfig):
        return [None]
    return [scope.value for scope in Scope if name not in NOT_LINEAR or scope.at_once]


def configured(name: str, scope: str | None, **options: Any) -> BalancerConfig:
    options |= {} if scope is None else {"scope": scope}
    options |= {"coefficient": FACTOR} if "coefficient" in BALANCERS.get(name).Config.model_fields else {}
    return BALANCERS.get(name).Config.model_validate(options)


def balance(config: BalancerConfig, layers: list[Leaves], context: RoutingContext) -> BalanceTerms:
    outputs = [leaves.outputs_TKM for leaves in layers] if config.needs_outputs else []
    return Balancing({"one": config}, len(layers), E, K)([leaves.decision() for leaves in layers], context, outputs)


def naive_loss(
    name: str, scope: str | None, options: dict[str, Any], leaves: Leaves, context: RoutingContext
) -> Tensor:
    """Mean over tokens of the loss of their set. In one process, a first micro-batch is all there is of wider sets."""
    decision = leaves.decision()
    assert decision.probabilities_TE is not None and decision.logits_TE is not None and context.document_BL is not None
    routed = Routed(
        decision.expert_ids_TK.tolist(),
        decision.weights_TK,
        decision.probabilities_TE,
        decision.logits_TE,
        leaves.clean_TE,
        leaves.scale_TE,
        leaves.vectors_EX,
        leaves.outputs_TKM,
    )
    valid = [True] * T if context.valid_BL is None else context.valid_BL.flatten().tolist()
    narrow = scope if scope in ("token", "sequence", "document") else "micro_batch"
    layer = NaiveLayer(routed.experts, decision.probabilities_TE, valid, context.document_BL.flatten().tolist())
    return torch.stack(
        [
            len(tokens) / sum(valid) * ORACLES[name].loss(routed, tokens, options)
            for tokens in sets_of(layer, narrow, LENGTH)
        ]
    ).sum()


def gradients(loss: Tensor, layers: list[Leaves]) -> list[Tensor]:
    leaves = [leaf for layer in layers for leaf in layer.differentiable()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if one is None else one for leaf, one in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "scope"), [(name, scope) for name in WITH_LOSS for scope in scopes_of(name)])
def test_loss_and_gradients_are_those_of_the_loops(name: str, scope: str | None, padded: bool):
    assert name in ORACLES, f"a balancer with a loss needs an oracle in naive_losses.py: {name}"
    context, drawn = draw_context(padded), [draw_leaves() for _ in range(LAYERS)]
    if scope == "token" and name == "importance":
        # The weights of no expert have no variation; its mean is 0.
        for leaves in drawn:
            leaves.expert_ids_TK[5] = torch.tensor([0, 1, 2])
    for options in ORACLES[name].options:
        config = configured(name, scope, **options)
        layers = [leaves.copy(torch.float64) for leaves in drawn]
        expected = FACTOR * torch.stack([naive_loss(name, scope, options, one, context) for one in layers]).sum()
        expected_gradients = gradients(expected, layers)
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            layers = [leaves.copy(dtype) for leaves in drawn]
            loss = balance(config, layers, context).loss
            assert loss.dtype == dtype and loss.shape == ()
            torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
            for actual, wanted in zip(gradients(loss, layers), expected_gradients, strict=True):
                error = (actual.double() - wanted).norm()
                assert error <= tolerance * wanted.norm().clamp(min=1e-3), (dtype, error)


@pytest.mark.parametrize(("name", "scope"), [(name, scope) for name in WITH_LOSS for scope in scopes_of(name)])
def test_what_padding_holds_changes_nothing(name: str, scope: str | None):
    context, layers = draw_context(padded=True), [draw_leaves()]
    before = balance(configured(name, scope), layers, context).loss
    padding_T = ~context.valid_BL.flatten()  # type: ignore[union-attr]
    layers[0].clean_TE[padding_T] = 30.0
    layers[0].outputs_TKM[padding_T] = 7.0
    layers[0].expert_ids_TK[padding_T] = torch.arange(K)
    torch.testing.assert_close(balance(configured(name, scope), layers, context).loss, before, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "scope"), [(name, scope) for name in WITH_LOSS for scope in scopes_of(name)])
def test_a_micro_batch_of_padding_has_no_loss_of_its_tokens(name: str, scope: str | None):
    context = replace(draw_context(padded=True), valid_BL=torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool))
    layers = [draw_leaves().copy(torch.float32)]
    loss = balance(configured(name, scope), layers, context).loss
    if name != "similarity_preserving":
        assert loss == 0
    assert all(gradient.isfinite().all() for gradient in gradients(loss, layers))


@pytest.mark.parametrize(("name", "scope"), [(name, scope) for name in WITH_LOSS for scope in scopes_of(name)])
def test_certain_scores_give_finite_gradients(name: str, scope: str | None):
    """Probabilities of exactly 0 and 1, all tokens on the same experts, outputs of zero."""
    layers = [draw_leaves()]
    layers[0].clean_TE.copy_(1e3 * torch.arange(E).flip(0))
    layers[0].expert_ids_TK.copy_(torch.arange(K).expand(T, K))
    layers[0].outputs_TKM.zero_()
    layers = [layers[0].copy(torch.float32)]
    loss = balance(configured(name, scope), layers, draw_context(padded=False)).loss
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, layers))


@pytest.mark.parametrize("name", BALANCERS.names())
def test_a_config_loads_back_equal_and_takes_a_schedule(name: str):
    cls = BALANCERS.get(name).Config
    config = cls.model_validate({})
    assert config.name == name and cls.model_validate_json(config.model_dump_json()) == config
    if "coefficient" in cls.model_fields and name != "l1_sparsity":
        scheduled = cls.model_validate({"coefficient": {0: 0.1, 10: 0.3}})
        assert Balancing({"one": scheduled}, 1, E, K).balancers["one"].coefficient(5) == pytest.approx(0.2)  # type: ignore[operator]


@pytest.mark.parametrize(("name", "scope"), [(name, scope) for name in BALANCERS.names() for scope in scopes_of(name)])
def test_a_resumed_run_continues_bit_for_bit(name: str, scope: str | None):
    config, context = configured(name, scope), draw_context(padded=True)
    steps = [[[draw_leaves() for _ in range(LAYERS)] for _ in range(2)] for _ in range(4)]

    def run(balancing: Balancing, chosen: slice) -> list[Tensor]:
        numbers = []
        for micro_batches in steps[chosen]:
            for layers in micro_batches:
                outputs = [leaves.outputs_TKM for leaves in layers] if config.needs_outputs else []
                numbers.append(balancing([leaves.decision() for leaves in layers], context, outputs).loss)
            balancing.finish_step()
        return numbers

    whole, first, second = (Balancing({"one": config}, LAYERS, E, K) for _ in range(3))
    expected = run(whole, slice(None))
    run(first, slice(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file))
    assert torch.equal(torch.stack(run(second, slice(2, None))), torch.stack(expected[4:]))
    assert whole.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("scope", ["global_batch", "window"])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_a_scope_of_other_micro_batches_is_refused_where_counts_do_not_do(name: str, scope: str):
    with pytest.raises(ValidationError, match=f"scope is {scope}, but this loss is not linear in what it averages"):
        configured(name, scope)


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_means_of_all_layers_cross_the_ranks_together(name: str, monkeypatch: pytest.MonkeyPatch):
    """One exchange per micro-batch, and none of counts."""
    asked: list[Tensor] = []

    def mean_over_ranks(self: Balancing, values: Tensor) -> Tensor:
        asked.append(values.detach())
        return values.detach()

    monkeypatch.setattr(Balancing, "mean_over_ranks", mean_over_ranks)
    config = configured(name, "data_parallel")
    balance(config, [draw_leaves() for _ in range(LAYERS)], draw_context(padded=True))
    assert [values.shape[:2] for values in asked] == [(LAYERS, 1)]
    assert BALANCERS.get(name)(config, LAYERS, E, K).reads_counts is None


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match=r"'load', but .* is 5 of 5 experts"):
        Balancing({"one": configured("load", None)}, 1, E, E)
    with pytest.raises(ValueError, match=r"'orthogonality', which compares .* is 1; take"):
        Balancing({"one": configured("orthogonality", None)}, 1, E, 1)


def value(name: str, decision: RoutingDecision) -> float:
    context = make_context(1, len(decision.expert_ids_TK))
    balancing = Balancing({"one": configured(name, "micro_batch")}, 1, E, K)
    return balancing([decision], context).values["one"].item()


def decided(experts: list[int]) -> RoutingDecision:
    """Every token is certain of one expert."""
    ids_TK = torch.tensor(experts)[:, None]
    probabilities_TE = torch.eye(E)[ids_TK[:, 0]]
    return RoutingDecision(ids_TK, torch.ones(ids_TK.shape), probabilities_TE, probabilities_TE.log())


@pytest.mark.parametrize(
    ("name", "even", "one_expert"), [("entropy", -1, 0), ("variance", -1, 0), ("importance", 0, E - 1)]
)
def test_ranges_in_closed_form(name: str, even: float, one_expert: float):
    assert value(name, decided([*range(E), *range(E)])) == pytest.approx(even, abs=1e-6)
    assert value(name, decided([2] * E)) == pytest.approx(one_expert, abs=1e-6)


def test_undecided_tokens_in_closed_form():
    undecided = replace(decided([*range(E)]), probabilities_TE=torch.full((E, E), 1 / E))
    assert value("entropy", undecided) == pytest.approx(0, abs=1e-6)
    assert value("variance", undecided) == pytest.approx(0, abs=1e-6)
    assert normalised_entropy(torch.tensor([[0.5, 0.5, 0, 0]])).item() == pytest.approx(0.5)


def test_small_differences_of_probability_keep_their_digits():
    """As at the start of training: 1/E and a thousandth of it."""
    shift_TE = torch.randn(64, E, dtype=torch.float64) * 1e-3 / E
    p_TE = (1 / E + shift_TE).float()
    expected = -p_TE.double().var(0, correction=0).sum().item() * E / (E - 1)
    assert value("variance", replace(decided([0] * 64), probabilities_TE=p_TE)) == pytest.approx(expected, rel=1e-4)


def test_squared_variation_in_closed_form():
    rows_XE = torch.tensor([[2.0, 2.0, 2.0, 2.0], [7.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0], [0.0] * 4])
    assert squared_variation(rows_XE).tolist() == pytest.approx([0.0, 3.0, 1.0, 0.0])


def test_chance_of_choice_is_that_of_drawing_the_noise_of_one_expert_again():
    clean_E, scale_E = torch.tensor([0.3, -0.2, 0.9, 0.0, -1.0]), torch.tensor([0.5, 1.0, 0.7, 2.0, 0.6])
    noisy_E = clean_E + torch.randn(E) * scale_E
    chance_E = chance_of_choice(noisy_E[None], Noise(clean_E[None], scale_E[None]), K)[0]
    draws = 40_000
    for i in range(E):
        again_UE = noisy_E.expand(draws, E).clone()
        again_UE[:, i] = clean_E[i] + torch.randn(draws) * scale_E[i]
        chosen = (again_UE.topk(K).indices == i).any(-1).float().mean().item()
        assert chance_E[i].item() == pytest.approx(chosen, abs=4 * math.sqrt(0.25 / draws))


def test_similarity_in_closed_form():
    assert similarity_preserving(torch.linalg.qr(torch.randn(M, E)).Q.T).item() == pytest.approx(0, abs=1e-5)
    assert similarity_preserving(torch.zeros(E, M)).item() == 1.0
    assert similarity_preserving(torch.eye(M)[:1].expand(E, M)).item() == E - 1


def test_overlap_of_outputs_in_closed_form():
    x_M, y_M = torch.eye(M)[:2]
    ids_TK = torch.tensor([[0, 1], [0, 1], [0, 1], [0, NO_EXPERT]])
    outputs_TKM = torch.stack(
        [torch.stack(pair) for pair in ((x_M, -3 * x_M), (x_M, y_M), (x_M + y_M, y_M), (x_M, x_M))]
    )
    for token, overlap in enumerate((1.0, 0.0, 0.5, 0.0)):
        actual = orthogonality(outputs_TKM[token : token + 1], ids_TK[token : token + 1])
        assert actual.item() == pytest.approx(overlap, abs=1e-6)
    # Any length is an angle: neither tiny nor large outputs are taken for orthogonal ones.
    for scale in (1e-8, 1e8):
        assert orthogonality(scale * outputs_TKM, ids_TK).item() == pytest.approx(1.5 / 4, rel=1e-5)


def test_overlap_with_one_decision_for_all_layers():
    config, context, leaves = configured("orthogonality", None), draw_context(padded=False), draw_leaves()
    outputs = [leaves.outputs_TKM, torch.ones(T, K, M, dtype=torch.float64)]
    together = Balancing({"one": config}, 1, E, K)([leaves.decision()], context, outputs).values["one"]
    single = [orthogonality(one, leaves.expert_ids_TK) for one in outputs]
    torch.testing.assert_close(together, (single[0] + single[1]) / 2)


@pytest.mark.parametrize("sparsity", ["model", "layer"])
def test_the_penalty_adapts_to_the_wanted_number_of_open_gates(sparsity: str):
    """Up by 1.2 where more than K gates per token are open, down where fewer are; padding does not count."""
    context = replace(make_context(1, 4), valid_BL=torch.tensor([[True, True, True, False]]))
    config = L1Sparsity.Config.model_validate({"sparsity": sparsity})
    balancing, factors = Balancing({"one": config}, 2, E, 2), [1e-8, 1e-8]
    # Open gates of the four tokens in both layers; two of each token are wanted.
    for step in ([[4, 3, 3, 1], [1, 1, 1, 4]], [[3, 2, 1, 4], [1, 3, 1, 4]], [[2, 2, 2, 0], [3, 2, 1, 0]]):
        decisions = []
        for numbers in step:
            ids_TK = torch.tensor([[e if e < number else NO_EXPERT for e in range(E)] for number in numbers])
            decisions.append(RoutingDecision(ids_TK, torch.ones(4, E), torch.full((4, E), 1 / E), torch.ones(4, E)))
        balancing(decisions, context)
        balancing.finish_step()
        closed = [1 - sum(numbers[:3]) / (3 * E) for numbers in step]
        if sparsity == "model":
            closed = [sum(closed) / 2] * 2
        signs = [0 if math.isclose(s, 1 - 2 / E) else math.copysign(1, 1 - 2 / E - s) for s in closed]
        factors = [factor * 1.2**sign for factor, sign in zip(factors, signs, strict=True)]
        assert balancing.get_buffer("balancers.one.factor_Y").tolist() == pytest.approx(factors, rel=1e-6)


def test_the_penalty_comes_back_from_its_limits():
    """Steps too sparse do not bring it to 0, from where nothing leads back, nor steps too dense to infinity."""
    balancing, context = Balancing({"one": L1Sparsity.Config.model_validate({})}, 1, E, 2), make_context(1, 4)
    factor_Y = balancing.get_buffer("balancers.one.factor_Y")
    for number, limit in ((0, torch.finfo(torch.float32).tiny), (E, torch.finfo(torch.float32).max)):
        factor_Y.fill_(limit)
        ids_TK = torch.arange(E).expand(4, E) if number else torch.full((4, E), NO_EXPERT)
        decision = RoutingDecision(ids_TK, torch.ones(4, E), torch.full((4, E), 1 / E), torch.ones(4, E))
        balancing([decision], context)
        balancing.finish_step()
        assert factor_Y.item() == limit
