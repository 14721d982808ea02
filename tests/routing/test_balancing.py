"""All balancers together over steps of several micro-batches and layers, against loops."""

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moe_testbed.routing.balancer import BalancerConfig
from moe_testbed.routing.balancers.load_balancing_loss import LoadBalancingLossConfig
from moe_testbed.routing.balancers.loss_free_bias import LossFreeBiasConfig
from moe_testbed.routing.balancers.z_loss import ZLossConfig
from moe_testbed.routing.balancing import Balancing
from moe_testbed.routing.records import RoutingDecision
from tests.routing.cases import make_context
from tests.routing.naive_balance import NaiveLayer, count, naive_loss

E, SEQUENCES, LENGTH, LAYERS = 5, 2, 4, 2
CONTEXT = make_context(SEQUENCES, LENGTH)


def random_decision(logits_TE: Tensor | None = None) -> RoutingDecision:
    if logits_TE is None:
        logits_TE = torch.randn(SEQUENCES * LENGTH, E) + torch.arange(E) / 2
    expert_ids_TK = logits_TE.topk(2).indices
    probabilities_TE = logits_TE.softmax(-1)
    return RoutingDecision(expert_ids_TK, probabilities_TE.gather(1, expert_ids_TK), probabilities_TE, logits_TE)


def random_steps(steps: int, micro_batches: int) -> list[list[list[RoutingDecision]]]:
    return [[[random_decision() for _ in range(LAYERS)] for _ in range(micro_batches)] for _ in range(steps)]


def naive_layer(decision: RoutingDecision) -> NaiveLayer:
    assert decision.probabilities_TE is not None
    return NaiveLayer(decision.expert_ids_TK.tolist(), decision.probabilities_TE, [True] * SEQUENCES * LENGTH)


def loss_config(**options: object) -> LoadBalancingLossConfig:
    return LoadBalancingLossConfig.model_validate(options)


def test_losses_of_two_steps_against_a_loop():
    """Every scope and estimator at once: online counts the step so far, previous the step before."""
    configs: dict[str, BalancerConfig] = {
        "online": loss_config(coefficient=0.3),
        "previous": loss_config(coefficient=0.5, estimator="previous"),
        "ranks": loss_config(coefficient=0.7, scope="data_parallel"),
        "micro": loss_config(coefficient=1.1, scope="micro_batch"),
        "sequences": loss_config(coefficient=1.3, scope="sequence"),
        "tokens": loss_config(coefficient=1.7, scope="token"),
        "z_loss": ZLossConfig(coefficient=1.9),
    }
    balancing = Balancing(configs, LAYERS, E)
    earlier: list[list[int]] | None = None
    for micro_batches in random_steps(steps=3, micro_batches=3):
        for number, layers in enumerate(micro_batches):
            terms = balancing(layers, CONTEXT)
            expected = dict.fromkeys(configs, 0.0)
            for y, decision in enumerate(layers):
                layer = naive_layer(decision)
                so_far = count([naive_layer(done[y]) for done in micro_batches[: number + 1]], E)
                own = count([layer], E)
                wider = {"online": so_far, "previous": so_far if earlier is None else earlier[y], "ranks": own}
                for label, counts in wider.items():
                    expected[label] += naive_loss(layer, "micro_batch", LENGTH, counts).item()
                expected["micro"] += naive_loss(layer, "micro_batch", LENGTH).item()
                expected["sequences"] += naive_loss(layer, "sequence", LENGTH).item()
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
        earlier = [count([naive_layer(layers[y]) for layers in micro_batches], E) for y in range(LAYERS)]
        assert balancing.previous_counts_YE.tolist() == earlier
        assert not balancing.step_counts_YE.any()


@pytest.mark.parametrize("scope", ["token", "sequence", "micro_batch", "data_parallel", "global_batch"])
def test_gradients_reach_every_layer_and_only_through_the_probabilities(scope: str):
    balancing = Balancing({"load_balancing_loss": loss_config(coefficient=0.3, scope=scope)}, LAYERS, E)
    leaves = [torch.randn(SEQUENCES * LENGTH, E, requires_grad=True) for _ in range(LAYERS)]
    terms = balancing([random_decision(leaf) for leaf in leaves], CONTEXT)
    actual = torch.autograd.grad(terms.loss, leaves)
    for leaf, gradient in zip(leaves, actual, strict=True):
        narrow = scope if scope in ("token", "sequence") else "micro_batch"
        naive = 0.3 * naive_loss(naive_layer(random_decision(leaf)), narrow, LENGTH)
        torch.testing.assert_close(gradient, torch.autograd.grad(naive, leaf)[0], rtol=1e-4, atol=1e-7)
    assert not any(value.requires_grad for value in terms.values.values())


def test_the_last_micro_batch_of_a_step_is_balanced_against_the_whole_batch():
    """All of the step is counted by then, so that the online estimator is exact."""
    (micro_batches,) = random_steps(steps=1, micro_batches=4)
    balancing = Balancing({"load_balancing_loss": loss_config(coefficient=1.0)}, LAYERS, E)
    for layers in micro_batches:
        last = balancing(layers, CONTEXT).loss
    whole = [count([naive_layer(layers[y]) for layers in micro_batches], E) for y in range(LAYERS)]
    expected = sum(
        naive_loss(naive_layer(decision), "micro_batch", LENGTH, whole[y])
        for y, decision in enumerate(micro_batches[-1])
    )
    torch.testing.assert_close(last, expected)


def test_padding_and_unused_choices_are_counted_nowhere():
    context = replace(CONTEXT, valid_BL=torch.tensor([[True, True, False, False], [True, False, True, True]]))
    balancing = Balancing({"loss_free_bias": LossFreeBiasConfig()}, 1, E)
    experts = [[0, 1], [2, -1], [3, 3], [4, 4], [0, 2], [3, 4], [-1, -1], [1, 0]]
    balancing([RoutingDecision(torch.tensor(experts), torch.ones(8, 2), torch.full((8, E), 1 / E))], context)
    assert balancing.step_counts_YE.tolist() == [[3, 2, 2, 0, 0]]


def test_balancing_one_layer_more_does_not_weaken_the_others():
    """The coefficient belongs to each layer: the losses are summed and not averaged."""
    decision = random_decision()
    one = Balancing({"load_balancing_loss": loss_config(scope="sequence")}, 1, E)([decision], CONTEXT)
    two = Balancing({"load_balancing_loss": loss_config(scope="sequence")}, 2, E)([decision] * 2, CONTEXT)
    torch.testing.assert_close(two.loss, 2 * one.loss)
    torch.testing.assert_close(two.values["load_balancing_loss"], one.values["load_balancing_loss"])


def test_biases_add_up():
    rates = {"fast": 0.02, "slow": 0.001}
    configs = {label: LossFreeBiasConfig(update_rate=rate) for label, rate in rates.items()}
    balancing = Balancing(configs, LAYERS, E)
    single = Balancing({"one": LossFreeBiasConfig(update_rate=0.021)}, LAYERS, E)
    for step in random_steps(3, 2):
        for layers in step:
            balancing(layers, CONTEXT)
            single(layers, CONTEXT)
        balancing.finish_step()
        single.finish_step()
    total, expected = balancing.selection_bias_YE(), single.selection_bias_YE()
    assert total is not None and expected is not None and expected.any()
    torch.testing.assert_close(total, expected)


def test_a_resumed_run_has_the_counts_of_the_last_step():
    configs = {"load_balancing_loss": loss_config(estimator="previous"), "loss_free_bias": LossFreeBiasConfig()}
    first_step, second_step = random_steps(steps=2, micro_batches=2)
    balancing, resumed = Balancing(configs, LAYERS, E), Balancing(configs, LAYERS, E)
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
    assert all(torch.equal(a, b) for a, b in zip(balancing.buffers(), resumed.buffers(), strict=True))


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_state_keeps_its_precision_when_the_model_is_cast(cast: str):
    balancing = Balancing({"loss_free_bias": LossFreeBiasConfig(update_rate=1e-3)}, LAYERS, E)
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
