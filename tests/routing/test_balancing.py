"""All balancers together over steps of several micro-batches and layers, against loops."""

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from moe_testbed.routing.balance.balancer import BalancerConfig, scheduled
from moe_testbed.routing.balance.balancers.load_balancing_loss import LoadBalancingLossConfig
from moe_testbed.routing.balance.balancers.loss_free_bias import LossFreeBiasConfig
from moe_testbed.routing.balance.balancers.z_loss import ZLossConfig
from moe_testbed.routing.balance.balancing import Balancing
from moe_testbed.routing.records import RoutingDecision
from moe_testbed.routing.scopes import Scope
from tests.routing.cases import make_context
from tests.routing.naive_balance import NaiveLayer, count, naive_loss, naive_window

E, K, SEQUENCES, LENGTH, LAYERS = 5, 2, 2, 4, 2
# One document in two parts, and one in both sequences.
CONTEXT = replace(make_context(SEQUENCES, LENGTH), document_BL=torch.tensor([[0, 0, 1, 0], [1, 1, 1, 2]]))


def random_decision(logits_TE: Tensor | None = None) -> RoutingDecision:
    if logits_TE is None:
        logits_TE = torch.randn(SEQUENCES * LENGTH, E) + torch.arange(E) / 2
    expert_ids_TK = logits_TE.topk(K).indices
    probabilities_TE = logits_TE.softmax(-1)
    return RoutingDecision(expert_ids_TK, probabilities_TE.gather(1, expert_ids_TK), probabilities_TE, logits_TE)


def random_steps(steps: int, micro_batches: int) -> list[list[list[RoutingDecision]]]:
    return [[[random_decision() for _ in range(LAYERS)] for _ in range(micro_batches)] for _ in range(steps)]


def naive_layer(decision: RoutingDecision) -> NaiveLayer:
    assert decision.probabilities_TE is not None
    assert CONTEXT.document_BL is not None
    documents = CONTEXT.document_BL.flatten().tolist()
    valid = [True] * len(decision.expert_ids_TK)
    return NaiveLayer(decision.expert_ids_TK.tolist(), decision.probabilities_TE, valid, documents)


def counts_of(micro_batches: list[list[RoutingDecision]], layer: int) -> list[int]:
    return count([naive_layer(layers[layer]) for layers in micro_batches], E)


def loss_config(**options: object) -> LoadBalancingLossConfig:
    return LoadBalancingLossConfig.model_validate(options)


def test_losses_of_some_steps_against_a_loop():
    """Every scope and estimator at once: online counts the step so far, previous the step before, exact the whole step,
    window a moving average of the steps before."""
    configs: dict[str, BalancerConfig] = {
        "online": loss_config(coefficient=0.3),
        "previous": loss_config(coefficient=0.5, estimator="previous"),
        "exact": loss_config(coefficient=0.2, estimator="exact"),
        "window_2": loss_config(coefficient=0.4, scope="window", window_steps=2),
        "window_16": loss_config(coefficient=0.6, scope="window"),
        "ranks": loss_config(coefficient=0.7, scope="data_parallel"),
        "micro": loss_config(coefficient=1.1, scope="micro_batch"),
        "sequences": loss_config(coefficient=1.3, scope="sequence"),
        "documents": loss_config(coefficient=1.5, scope="document"),
        "tokens": loss_config(coefficient=1.7, scope="token"),
        "z_loss": ZLossConfig(coefficient=1.9),
    }
    balancing = Balancing(configs, LAYERS, E, K)
    history: list[list[list[int]]] = []
    for micro_batches in random_steps(steps=4, micro_batches=3):
        whole = [counts_of(micro_batches, y) for y in range(LAYERS)]
        balancing.begin_step([(layers, None) for layers in micro_batches])
        for number, layers in enumerate(micro_batches):
            terms = balancing(layers, CONTEXT)
            expected = dict.fromkeys(configs, 0.0)
            for y, decision in enumerate(layers):
                layer = naive_layer(decision)
                so_far = counts_of(micro_batches[: number + 1], y)
                earlier = [step[y] for step in history] or [so_far]
                wider: dict[str, Sequence[float]] = {
                    "online": so_far,
                    "previous": earlier[-1],
                    "exact": whole[y],
                    "window_2": naive_window(earlier, 2),
                    "window_16": naive_window(earlier, 16),
                    "ranks": count([layer], E),
                }
                for label, counts in wider.items():
                    expected[label] += naive_loss(layer, "micro_batch", LENGTH, counts).item()
                expected["micro"] += naive_loss(layer, "micro_batch", LENGTH).item()
                expected["sequences"] += naive_loss(layer, "sequence", LENGTH).item()
                expected["documents"] += naive_loss(layer, "document", LENGTH).item()
                expected["tokens"] += naive_loss(layer, "token", LENGTH).item()
                assert decision.logits_TE is not None
                expected["z_loss"] += decision.logits_TE.exp().sum(-1).log().square().mean().item()
            # The values are means over layers, the loss sums them.
            assert {label: value.item() for label, value in terms.values.items()} == pytest.approx(
                {label: total / LAYERS for label, total in expected.items()}, rel=1e-5
            )
            total = sum(configs[label].coefficient * value for label, value in expected.items())  # type: ignore[attr-defined]
            assert terms.loss.item() == pytest.approx(total, rel=1e-5)
        balancing.finish_step()
        history.append(whole)
        assert balancing.previous_counts_YE.tolist() == whole
        assert not balancing.step_counts_YE.any()


@pytest.mark.parametrize("scope", [scope.value for scope in Scope])
def test_gradients_reach_every_layer_and_only_through_the_probabilities(scope: str):
    balancing = Balancing({"load_balancing_loss": loss_config(coefficient=0.3, scope=scope)}, LAYERS, E, K)
    leaves = [torch.randn(SEQUENCES * LENGTH, E, requires_grad=True) for _ in range(LAYERS)]
    terms = balancing([random_decision(leaf) for leaf in leaves], CONTEXT)
    actual = torch.autograd.grad(terms.loss, leaves)
    for leaf, gradient in zip(leaves, actual, strict=True):
        narrow = scope if scope in ("token", "sequence", "document") else "micro_batch"
        naive = 0.3 * naive_loss(naive_layer(random_decision(leaf)), narrow, LENGTH)
        torch.testing.assert_close(gradient, torch.autograd.grad(naive, leaf)[0], rtol=1e-4, atol=1e-7)
    assert not any(value.requires_grad for value in terms.values.values())


def test_the_last_micro_batch_of_a_step_is_balanced_against_the_whole_batch():
    """All of the step is counted by then, so that the online estimator is exact."""
    (micro_batches,) = random_steps(steps=1, micro_batches=4)
    balancing = Balancing({"load_balancing_loss": loss_config(coefficient=1.0)}, LAYERS, E, K)
    for layers in micro_batches:
        last = balancing(layers, CONTEXT).loss
    expected = sum(
        naive_loss(naive_layer(decision), "micro_batch", LENGTH, counts_of(micro_batches, y))
        for y, decision in enumerate(micro_batches[-1])
    )
    torch.testing.assert_close(last, expected)


def test_exact_is_the_loss_of_the_concatenated_batch_whatever_the_micro_batches():
    """Loss and gradient of the mean over micro-batches; routing ahead leaves no trace in the counts."""
    logits_TE = torch.randn(4 * SEQUENCES * LENGTH, E, dtype=torch.float64) + torch.arange(E) / 2
    naive_TE = logits_TE.clone().requires_grad_()
    naive = 0.3 * naive_loss(naive_layer(random_decision(naive_TE)), "micro_batch", LENGTH)
    expected_TE = torch.autograd.grad(naive, naive_TE)[0]
    for micro_batches in (1, 2, 4):
        leaf = logits_TE.clone().requires_grad_()
        balancing = Balancing({"even": loss_config(coefficient=0.3, estimator="exact")}, 1, E, K)
        assert balancing.reads_counts_ahead
        context = make_context(4 * SEQUENCES // micro_batches, LENGTH)
        parts = [[random_decision(part_TE)] for part_TE in leaf.chunk(micro_batches)]
        if micro_batches > 1:
            balancing.begin_step([(layers, None) for layers in parts])
        loss = torch.stack([balancing(layers, context).loss for layers in parts]).mean()
        torch.testing.assert_close(loss, naive, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], expected_TE, rtol=1e-10, atol=1e-15)
        assert balancing.finish_step().counts_YE.tolist() == [counts_of([[random_decision(logits_TE)]], 0)]


def test_counts_ahead_serve_one_step():
    first, second = random_steps(steps=2, micro_batches=1)
    balancing = Balancing({"even": loss_config(coefficient=1.0, estimator="exact")}, LAYERS, E, K)
    balancing.begin_step([(layers, None) for layers in first])
    balancing(first[0], CONTEXT)
    balancing.finish_step()
    online = Balancing({"even": loss_config(coefficient=1.0)}, LAYERS, E, K)
    assert torch.equal(balancing(second[0], CONTEXT).loss, online(second[0], CONTEXT).loss)


def test_counts_ahead_leave_padding_out():
    balancing = Balancing({"even": loss_config(estimator="exact")}, 1, E, K)
    decision = replace(random_decision(), expert_ids_TK=torch.tensor([[0, 1]] * 4 + [[2, -1]] * 4))
    balancing.begin_step([([decision], torch.tensor([True, False] * 4)), ([decision], None)])
    assert balancing.counts_ahead_YE.tolist() == [[2 + 4, 2 + 4, 2 + 4, 0, 0]]


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (0.5, {0: 0.5, 7: 0.5}),
        ({10: 0.5}, {0: 0.5, 10: 0.5, 99: 0.5}),
        ({0: 0.1, 10: 0.3}, {0: 0.1, 1: 0.12, 5: 0.2, 9: 0.28, 10: 0.3, 11: 0.3}),
        # Whatever the order in which they are written.
        ({20: 0.0, 4: 1.0, 12: 0.5}, {0: 1.0, 4: 1.0, 6: 0.875, 12: 0.5, 16: 0.25, 20: 0.0, 1000: 0.0}),
    ],
)
def test_a_schedule_is_linear_between_its_steps_and_constant_outside(
    schedule: float | dict[int, float], values: dict[int, float]
):
    config = loss_config(coefficient=schedule, scope="micro_batch")
    assert type(config).model_validate_json(config.model_dump_json()) == config
    decision = [random_decision()]
    for step, value in values.items():
        assert scheduled(config.coefficient, step) == pytest.approx(value, abs=1e-12)
        terms = Balancing({"even": config}, 1, E, K)(decision, replace(CONTEXT, step=step))
        torch.testing.assert_close(terms.loss, value * terms.values["even"])


@pytest.mark.parametrize("schedule", [{}, -0.1, {0: -1.0}, {-1: 0.1}, {0: float("nan")}, float("inf"), {"soon": 0.1}])
def test_what_is_no_schedule_is_refused(schedule: object):
    with pytest.raises(ValidationError, match="coefficient"):
        loss_config(coefficient=schedule)


def test_padding_and_unused_choices_are_counted_nowhere():
    context = replace(CONTEXT, valid_BL=torch.tensor([[True, True, False, False], [True, False, True, True]]))
    balancing = Balancing({"loss_free_bias": LossFreeBiasConfig()}, 1, E, K)
    experts = [[0, 1], [2, -1], [3, 3], [4, 4], [0, 2], [3, 4], [-1, -1], [1, 0]]
    balancing([RoutingDecision(torch.tensor(experts), torch.ones(8, 2), torch.full((8, E), 1 / E))], context)
    assert balancing.step_counts_YE.tolist() == [[3, 2, 2, 0, 0]]


def test_balancing_one_layer_more_does_not_weaken_the_others():
    """The coefficient belongs to each layer: the losses are summed and not averaged."""
    decision = random_decision()
    one = Balancing({"load_balancing_loss": loss_config(scope="sequence")}, 1, E, K)([decision], CONTEXT)
    two = Balancing({"load_balancing_loss": loss_config(scope="sequence")}, 2, E, K)([decision] * 2, CONTEXT)
    torch.testing.assert_close(two.loss, 2 * one.loss)
    torch.testing.assert_close(two.values["load_balancing_loss"], one.values["load_balancing_loss"])


def test_biases_add_up():
    rates = {"fast": 0.02, "slow": 0.001}
    configs = {label: LossFreeBiasConfig(update_rate=rate) for label, rate in rates.items()}
    balancing = Balancing(configs, LAYERS, E, K)
    single = Balancing({"one": LossFreeBiasConfig(update_rate=0.021)}, LAYERS, E, K)
    for step in random_steps(3, 2):
        for layers in step:
            balancing(layers, CONTEXT)
            single(layers, CONTEXT)
        balancing.finish_step()
        single.finish_step()
    total, expected = balancing.selection_bias_YE(), single.selection_bias_YE()
    assert total is not None and expected is not None and expected.any()
    torch.testing.assert_close(total, expected)


def test_a_resumed_run_has_the_counts_of_the_earlier_steps():
    configs: dict[str, BalancerConfig] = {
        "previous": loss_config(estimator="previous"),
        "window": loss_config(scope="window", window_steps=3),
        "loss_free_bias": LossFreeBiasConfig(),
        "bias_of_window": LossFreeBiasConfig(scope=Scope.WINDOW, window_steps=5, update="proportional"),
    }
    *first_steps, second_step = random_steps(steps=4, micro_batches=2)
    balancing, resumed = Balancing(configs, LAYERS, E, K), Balancing(configs, LAYERS, E, K)
    for first_step in first_steps:
        for layers in first_step:
            balancing(layers, CONTEXT)
        balancing.finish_step()
    file = io.BytesIO()
    torch.save(balancing.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file))
    for layers in second_step:
        assert torch.equal(resumed(layers, CONTEXT).loss, balancing(layers, CONTEXT).loss)
    balancing.finish_step()
    resumed.finish_step()
    assert {"window_3_counts_YE", "window_5_counts_YE", "previous_counts_YE"} <= balancing.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(balancing.buffers(), resumed.buffers(), strict=True))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_state_keeps_its_precision_when_the_model_is_cast(cast: str):
    balancing = Balancing({"loss_free_bias": LossFreeBiasConfig(update_rate=1e-3)}, LAYERS, E, K)
    for step in random_steps(5, 1):
        for layers in step:
            balancing(layers, CONTEXT)
        balancing.finish_step()
    before = {name: value.clone() for name, value in balancing.state_dict().items()}
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "balancing": balancing})
    getattr(model, cast)()
    assert model["linear"].weight.dtype == getattr(torch, cast)
    for name, value in balancing.state_dict().items():
        assert value.dtype == before[name].dtype and torch.equal(value, before[name]), name
    assert before["balancers.loss_free_bias.bias_YE"].any()
