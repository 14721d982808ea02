"""The load and the load-balancing loss in every scope, against loops over tokens."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_testbed.routing.balance.balancers.load_balancing_loss import load_balancing_loss
from moe_testbed.routing.load import Load, count_assignments, load_in_sets, token_sets
from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.scopes import Estimator, Scope, ScopeConfig
from tests.routing.cases import DOMAINS, make_context, make_router
from tests.routing.naive_balance import NaiveLayer, count, naive_loss

NARROW = [Scope.TOKEN, Scope.SEQUENCE, Scope.DOCUMENT, Scope.MICRO_BATCH]
SIZES = [(4, 1), (8, 2), (6, 3), (16, 5), (5, 5)]


def draw_experts(tokens: int, num_experts: int, top_k: int) -> Tensor:
    """K different experts for every token; some choices are no expert's."""
    expert_ids_TK = torch.rand(tokens, num_experts).argsort(-1)[:, :top_k]
    return expert_ids_TK.masked_fill(torch.rand(tokens, top_k) < 0.2, NO_EXPERT)


def load_in_scope(
    scope: Scope, decision: RoutingDecision, context: RoutingContext, wider_counts_E: Tensor | None = None
) -> Load:
    """The load over the balance sets of a scope."""
    return load_in_sets(token_sets(scope, context), decision, context.valid_T, wider_counts_E)


class AsGiven(torch.nn.Module):
    """In place of a router's scorer: what comes in is the logits."""

    weight = torch.zeros(())

    def forward(self, logits_TE: Tensor) -> Tensor:
        return logits_TE


def decision_of(expert_ids_TK: Tensor, probabilities_TE: Tensor) -> RoutingDecision:
    return RoutingDecision(expert_ids_TK, torch.ones(expert_ids_TK.shape), probabilities_TE)


def naive_layer(decision: RoutingDecision, context: RoutingContext) -> NaiveLayer:
    assert decision.probabilities_TE is not None
    valid = [True] * len(decision.expert_ids_TK) if context.valid_BL is None else context.valid_BL.flatten().tolist()
    assert context.document_BL is not None
    documents = context.document_BL.flatten().tolist()
    return NaiveLayer(decision.expert_ids_TK.tolist(), decision.probabilities_TE, valid, documents)


def loss_and_gradient(
    scope: Scope,
    logits_TE: Tensor,
    expert_ids_TK: Tensor,
    context: RoutingContext,
    wider_counts_E: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    logits_TE = logits_TE.clone().requires_grad_()
    decision = decision_of(expert_ids_TK, logits_TE.softmax(-1))
    loss = load_balancing_loss(load_in_scope(scope, decision, context, wider_counts_E))
    return loss, torch.autograd.grad(loss, logits_TE)[0]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("scope", list(Scope))
def test_loss_and_gradient_are_those_of_the_loops(scope: Scope, padded: bool):
    # Documents of uneven length, some in parts, some in several sequences.
    context, E = replace(make_context(4, 6), document_BL=torch.randint(3, (4, 6))), 7
    if padded:
        # The last sequence is all padding, and so are some tokens elsewhere.
        valid_BL = torch.rand(4, 6) < 0.7
        valid_BL[3] = False
        context = replace(context, valid_BL=valid_BL)
    logits_TE = torch.randn(24, E, dtype=torch.float64)
    expert_ids_TK = draw_experts(24, E, 3)
    wider_counts = None if scope in NARROW else [5, 0, 9, 2, 2, 31, 1]
    wider_counts_E = None if wider_counts is None else torch.tensor(wider_counts)
    loss, gradient_TE = loss_and_gradient(scope, logits_TE, expert_ids_TK, context, wider_counts_E)

    naive_TE = logits_TE.clone().requires_grad_()
    layer = naive_layer(decision_of(expert_ids_TK, naive_TE.softmax(-1)), context)
    naive = naive_loss(layer, scope.value if scope in NARROW else "micro_batch", 6, wider_counts)
    torch.testing.assert_close(loss, naive, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradient_TE, torch.autograd.grad(naive, naive_TE)[0], rtol=1e-10, atol=1e-14)
    if padded:
        assert (gradient_TE[~torch.tensor(layer.valid)] == 0).all()


@pytest.mark.parametrize("scope", NARROW)
def test_what_padding_holds_changes_nothing(scope: Scope):
    context, E = make_context(4, 6), 7
    valid_BL = torch.rand(4, 6) < 0.6
    context, padding_T = replace(context, valid_BL=valid_BL), ~valid_BL.flatten()
    logits_TE, expert_ids_TK = torch.randn(24, E), draw_experts(24, E, 2)
    loss, _ = loss_and_gradient(scope, logits_TE, expert_ids_TK, context)
    logits_TE[padding_T] = 50.0 * torch.eye(E)[0]
    expert_ids_TK[padding_T] = torch.tensor([0, 1])
    assert loss_and_gradient(scope, logits_TE, expert_ids_TK, context)[0] == loss


def test_counts_are_those_of_a_loop():
    expert_ids_TK, valid_T = draw_experts(40, 9, 3), torch.rand(40) < 0.5
    layer = NaiveLayer(expert_ids_TK.tolist(), torch.zeros(40, 9), [True] * 40)
    assert count_assignments(expert_ids_TK, 9).tolist() == count([layer], 9)
    assert count_assignments(expert_ids_TK, 9, valid_T).tolist() == count([replace(layer, valid=valid_T.tolist())], 9)


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_uniform_probabilities_give_one_whatever_the_counts(num_experts: int, top_k: int, scope: Scope):
    context = make_context(3, 4)
    expert_ids_TK = torch.rand(12, num_experts).argsort(-1)[:, :top_k]
    wider_E = None if scope in NARROW else torch.randint(1, 9, (num_experts,))
    loss, _ = loss_and_gradient(scope, torch.zeros(12, num_experts), expert_ids_TK, context, wider_E)
    assert loss.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("scope", [scope for scope in Scope if scope is not Scope.TOKEN])
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_even_counts_give_one_whatever_the_probabilities(num_experts: int, top_k: int, scope: Scope):
    """In every sequence each expert is chosen K times."""
    context = make_context(2, 2 * num_experts)
    places = torch.arange(4 * num_experts)
    expert_ids_TK = (places[:, None] + torch.arange(top_k)) % num_experts
    logits_TE = torch.randn(len(places), num_experts)
    wider_E = None if scope in NARROW else torch.full((num_experts,), 12)
    loss, gradient_TE = loss_and_gradient(scope, logits_TE, expert_ids_TK, context, wider_E)
    assert loss.item() == pytest.approx(1.0, abs=1e-6)
    assert gradient_TE.abs().max() < 1e-7


@pytest.mark.parametrize("scope", list(Scope))
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_all_tokens_on_the_same_experts(num_experts: int, top_k: int, scope: Scope):
    """E / K times the probability that lies on them; E p for one expert."""
    context = make_context(3, 4)
    expert_ids_TK = torch.arange(top_k).expand(12, top_k)
    logits_TE = torch.randn(12, num_experts)
    wider_E = None if scope in NARROW else 40 * (torch.arange(num_experts) < top_k)
    loss, _ = loss_and_gradient(scope, logits_TE, expert_ids_TK, context, wider_E)
    probability = logits_TE.softmax(-1)[:, :top_k].sum(-1).mean().item()
    assert loss.item() == pytest.approx(num_experts / top_k * probability, rel=1e-5)


def test_a_token_without_any_expert_counts_nowhere():
    context = make_context(1, 4)
    expert_ids_TK = torch.tensor([[NO_EXPERT, NO_EXPERT], [0, NO_EXPERT], [1, 0], [2, 1]])
    load = load_in_scope(Scope.SEQUENCE, decision_of(expert_ids_TK, torch.full((4, 4), 0.25)), context)
    torch.testing.assert_close(load.fractions_GE, torch.tensor([[0.4, 0.4, 0.2, 0.0]]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_counts_over_all_ranks_give_the_loss_and_gradient_of_the_concatenated_batch(ranks: int):
    """Ranks average their gradients."""
    context, E = make_context(2 * ranks, 4), 6
    logits_TE, expert_ids_TK = torch.randn(8 * ranks, E, dtype=torch.float64), draw_experts(8 * ranks, E, 2)
    whole, whole_TE = loss_and_gradient(Scope.MICRO_BATCH, logits_TE, expert_ids_TK, context)
    counts_E = count_assignments(expert_ids_TK, E)
    losses, gradients = [], []
    for rank in range(ranks):
        tokens = slice(8 * rank, 8 * rank + 8)
        part = make_context(2, 4)
        loss, gradient_TE = loss_and_gradient(
            Scope.DATA_PARALLEL, logits_TE[tokens], expert_ids_TK[tokens], part, counts_E
        )
        losses.append(loss)
        gradients.append(gradient_TE / ranks)
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients), whole_TE, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(("num_experts", "top_k"), [(16, 1), (16, 2), (24, 3)])
def test_perfect_routing_by_domain_is_balanced_over_the_batch_and_over_nothing_smaller(num_experts: int, top_k: int):
    """Single-domain sequences or documents use the E_d experts of their domain evenly: their own loss is E / E_d."""
    D, size = len(DOMAINS), num_experts // len(DOMAINS)
    router = make_router(("reference", {}), top_k, num_experts=num_experts)
    context = make_context(D, size)
    context = replace(context, domain_BL=torch.arange(D)[:, None].expand(D, size))
    # Scores that make token t of domain d choose the experts t, t + 1, ... of its group.
    wanted_TK = torch.tensor([[size * d + (t + j) % size for j in range(top_k)] for d in range(D) for t in range(size)])
    logits_TE = torch.zeros(D * size, num_experts).scatter_(1, wanted_TK, 2.0)
    router.scorer = AsGiven()
    decision = router(logits_TE, context)
    assert torch.equal(decision.expert_ids_TK.sort(-1).values, wanted_TK.sort(-1).values)

    over_batch = load_balancing_loss(load_in_scope(Scope.MICRO_BATCH, decision, context))
    assert over_batch.item() == pytest.approx(1.0, rel=1e-6)
    over_sequences = load_balancing_loss(load_in_scope(Scope.SEQUENCE, decision, context))
    assert over_sequences.item() == pytest.approx(num_experts / size, rel=1e-6)

    # The same tokens, two documents of different domains to a sequence.
    packed = replace(make_context(D // 2, 2 * size), document_BL=context.domain_BL.reshape(D // 2, 2 * size))
    over_documents = load_balancing_loss(load_in_scope(Scope.DOCUMENT, decision, packed))
    assert over_documents.item() == pytest.approx(num_experts / size, rel=1e-6)
    over_sequences = load_balancing_loss(load_in_scope(Scope.SEQUENCE, decision, packed))
    assert over_sequences.item() == pytest.approx(num_experts / size / 2, rel=1e-6)


def test_scopes_are_named_as_configs_write_them():
    scopes = ["token", "sequence", "document", "micro_batch", "data_parallel", "global_batch", "window"]
    assert [scope.value for scope in Scope] == scopes


def test_a_document_is_its_part_of_each_sequence():
    """Whether it comes once or twice in the sequence; another sequence's part is another set."""
    context = replace(make_context(2, 4), document_BL=torch.tensor([[5, 5, 7, 5], [5, 900, 900, 900]]))
    sets = token_sets(Scope.DOCUMENT, context)
    assert sets.number == 4 and sets.set_T is not None
    tokens: dict[int, list[int]] = {}
    for token, number in enumerate(sets.set_T.tolist()):
        tokens.setdefault(number, []).append(token)
    assert sorted(tokens.values()) == [[0, 1, 3], [2], [4], [5, 6, 7]]


def test_one_document_per_sequence_is_scope_sequence():
    context = replace(make_context(3, 4), document_BL=torch.tensor([[8], [2], [8]]).expand(3, 4))
    logits_TE, expert_ids_TK = torch.randn(12, 5), draw_experts(12, 5, 2)
    of_document = loss_and_gradient(Scope.DOCUMENT, logits_TE, expert_ids_TK, context)
    of_sequence = loss_and_gradient(Scope.SEQUENCE, logits_TE, expert_ids_TK, context)
    torch.testing.assert_close(of_document, of_sequence)


def test_scope_document_needs_documents():
    with pytest.raises(ValueError, match="scope document needs the number of every token's document, which this"):
        token_sets(Scope.DOCUMENT, replace(make_context(), document_BL=None))


def test_options_that_a_scope_would_ignore_are_refused():
    for estimator in (Estimator.PREVIOUS, Estimator.EXACT):
        assert ScopeConfig(estimator=estimator).estimator is estimator
        with pytest.raises(ValueError, match=f"estimator is {estimator.value} with scope window"):
            ScopeConfig(scope=Scope.WINDOW, estimator=estimator)
    assert ScopeConfig(scope=Scope.WINDOW, window_steps=3).window_steps == 3
    with pytest.raises(ValueError, match="window_steps is 3 with scope global_batch, which has no window"):
        ScopeConfig(window_steps=3)
