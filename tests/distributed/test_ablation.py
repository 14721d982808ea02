"""The ablation against loops: one sequence, one token and one choice at a time, without barring anything.

Shape legend: N evaluated sequences, D domains, Y MoE layers, E experts, L positions, K choices, T tokens, M model
width, F feed-forward width.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.train.ablated_model import ablate_model
from moe_testbed.launcher.train.ablation import MOST_EXPERTS, ablated_experts
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.evaluation import Evaluator
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.model.deepspeed_moe import create_expert_parallel_groups
from moe_testbed.model.language_model import LanguageModel

PER_DOMAIN = 3
TOLERANCE = 2e-6


def prepare(config: dict[str, Any]) -> tuple[LanguageModel, EvaluationSet, ExperimentConfig, Ranks]:
    """A model whose experts matter and whose router has preferences, and the evaluation set."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    size = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    create_expert_parallel_groups(experiment.parallel.expert_parallel_size)
    model = build_model(experiment, store, ranks)
    for moe in model.moe_layers():
        moe.set_deepspeed_parallelism()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".router." in name:
                parameter.mul_(40)
            elif ".experts." in name:
                parameter.mul_(3)
    held_out = EvaluationSet.of(store, "validation", experiment.data.sequence_length, 5)
    return model, held_out, experiment, ranks


def ablate(config: dict[str, Any]) -> dict[str, Any]:
    model, held_out, experiment, ranks = prepare(config)
    counts_YDE = Evaluator(experiment, held_out, ranks).run(model, 0).counts_top_k_YDE
    return ablate_model(model, held_out.first(PER_DOMAIN), counts_YDE, 2, 0, ranks).arrays()


def expert_output(model: LanguageModel, layer: int, expert: int, x_M: Tensor) -> Tensor:
    experts = model.moe_layers()[layer].deepspeed_moe.experts
    gate_F, up_F = (x_M @ experts.gate_up[expert]).chunk(2)
    output: Tensor = (F.silu(gate_F) * up_F) @ experts.down[expert]
    return output


def ablate_naively(config: dict[str, Any], group_YE: Any) -> dict[str, Any]:
    """In one process. A router's logits are overwritten where experts are barred; layers are loops over tokens."""
    model, held_out, experiment, ranks = prepare(config)
    torch.set_grad_enabled(False)
    model.eval()
    sample = held_out.first(PER_DOMAIN)
    domains, E, Y = len(sample.domains), experiment.model.moe.num_experts, experiment.model.num_layers
    shares = list(sample.shares(ranks, 1, 0))
    routers = [router.get_submodule("scorer") for router in model.routers()]
    layers = model.moe_layers()
    seen: list[list[tuple[Tensor, list[int], list[float]]]] = [[] for _ in range(Y)]

    def losses() -> list[float]:
        return [float(model(s.context, s.targets_BL).cross_entropy_BL.double().mean()) for s in shares]

    def losses_under(hooks: dict[Any, Any]) -> list[float]:
        handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
        result = losses()
        for handle in handles:
            handle.remove()
        return result

    def barring(experts: list[int]) -> Any:
        def bar(module: Any, inputs: Any, logits_TE: Tensor) -> Tensor:
            logits_TE = logits_TE.clone()
            logits_TE[:, experts] = float("-inf")
            return logits_TE

        return bar

    def watching(y: int) -> Any:
        def watch(module: Any, inputs: Any, output: Any) -> None:
            ids_TK, weights_TK = inputs[1].expert_ids_TK.tolist(), inputs[1].weights_TK.tolist()
            seen[y] += list(zip(inputs[0].flatten(0, 1), ids_TK, weights_TK, strict=True))

        return watch

    def averaging(y: int, expert: int, mean_M: Tensor) -> Any:
        def average(module: Any, inputs: Any, output: Any) -> Any:
            rows = []
            chosen = zip(inputs[1].expert_ids_TK.tolist(), inputs[1].weights_TK.tolist(), strict=True)
            for x_M, (ids, weights) in zip(inputs[0].flatten(0, 1), chosen, strict=True):
                parts = [mean_M if e == expert else expert_output(model, y, e, x_M) for e in ids]
                rows.append(sum(w * part for w, part in zip(weights, parts, strict=True)))
            return type(output)(torch.stack(rows).view_as(inputs[0]), output.kept_TK)

        return average

    result: dict[str, Any] = {"baseline_loss_N": losses_under({moe: watching(y) for y, moe in enumerate(layers)})}
    result["ablation_loss_YEN"] = [[losses_under({routers[y]: barring([e])}) for e in range(E)] for y in range(Y)]
    result["mean_loss_YEN"] = [[[float("nan")] * len(sample) for _ in range(E)] for _ in range(Y)]
    for y in range(Y):
        for e in range(E):
            outputs = [expert_output(model, y, e, x_M) for x_M, ids, _ in seen[y] if e in ids]
            if outputs:
                mean_M = torch.stack(outputs).mean(0)
                result["mean_loss_YEN"][y][e] = losses_under({layers[y]: averaging(y, e, mean_M)})
    result["forced_loss_DN"] = [
        losses_under({routers[y]: barring([e for e in range(E) if group_YE[y][e] != domain]) for y in range(Y)})
        for domain in range(domains)
    ]
    # All sample tokens, fewer than 256, are the probe.
    result["expert_cosine_YEE"] = np.zeros((Y, E, E))
    for y in range(Y):
        for x_M, _, _ in seen[y]:
            outputs_EM = torch.stack([expert_output(model, y, e, x_M) for e in range(E)])
            for i in range(E):
                for j in range(E):
                    cosine = F.cosine_similarity(outputs_EM[i], outputs_EM[j], dim=0)
                    result["expert_cosine_YEE"][y, i, j] += float(cosine) / len(seen[y])
    return result


@pytest.fixture(scope="module")
def ablated(run_on_ranks: Callable[..., list[Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """``ablated(config)`` -> the arrays of one process, computed once for the same config."""
    found: dict[str, dict[str, Any]] = {}

    def of(config: dict[str, Any]) -> dict[str, Any]:
        key = json.dumps(config, sort_keys=True)
        if key not in found:
            (found[key],) = run_on_ranks(ablate, 1, config)
        return found[key]

    return of


@pytest.fixture
def config(make_experiment: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return make_experiment(routing={"balance": {}})


def test_ablation_equals_loops(
    config: dict[str, Any],
    run_on_ranks: Callable[..., list[Any]],
    ablated: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    arrays = ablated(config)
    (naive,) = run_on_ranks(ablate_naively, 1, config, arrays["group_YE"].tolist())
    assert arrays["redundancy_tokens"] == 3 * PER_DOMAIN * 16
    assert arrays["sequence_domain_N"].tolist() == [0, 1, 2] * PER_DOMAIN
    for name in ("baseline_loss_N", "ablation_loss_YEN", "mean_loss_YEN", "forced_loss_DN"):
        np.testing.assert_allclose(arrays[name], naive[name], rtol=TOLERANCE, err_msg=name)
    np.testing.assert_allclose(arrays["expert_cosine_YEE"], naive["expert_cosine_YEE"], atol=1e-5)
    # What is compared says something: experts matter, and not all alike.
    damage = arrays["ablation_loss_YEN"] - arrays["baseline_loss_N"]
    assert np.abs(damage).max() > 1e-2
    assert np.abs(arrays["mean_loss_YEN"] - arrays["ablation_loss_YEN"]).max() > 1e-2
    assert arrays["weight_cosine_YEE"].shape == (2, 8, 8)
    np.testing.assert_allclose(arrays["weight_cosine_YEE"][:, range(8), range(8)], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("ranks", "expert_parallel", "router"), [(2, 1, "top_k"), (2, 2, "top_k"), (2, 2, "relu"), (2, 2, "hash")]
)
def test_ranks_do_not_matter(
    ranks: int,
    expert_parallel: int,
    router: str,
    config: dict[str, Any],
    run_on_ranks: Callable[..., list[Any]],
    ablated: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Nine sequences, two at a time and rank: in the last batch one rank has nothing that counts."""
    config["routing"] = {"router": {"name": router}}
    alone = ablated(config)
    for arrays in run_on_ranks(ablate, ranks, config | {"parallel": {"expert_parallel_size": expert_parallel}}):
        assert arrays.keys() == alone.keys()
        for name, array in arrays.items():
            if array.dtype.kind == "f":
                np.testing.assert_allclose(array, alone[name], rtol=1e-5, atol=1e-6, err_msg=name)
            else:
                np.testing.assert_array_equal(array, alone[name], err_msg=name)


def test_capacity_is_ablated_without_dropping(
    config: dict[str, Any],
    run_on_ranks: Callable[..., list[Any]],
    ablated: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    moe = config["model"]["moe"]
    dropless = ablated(config)
    tight = config | {"model": config["model"] | {"moe": moe | {"dispatch": "capacity", "capacity_factor": 0.5}}}
    (capacity,) = run_on_ranks(ablate, 1, tight)
    for name in ("baseline_loss_N", "ablation_loss_YEN", "mean_loss_YEN"):
        np.testing.assert_array_equal(capacity[name], dropless[name], err_msg=name)


def losses_under_labels(config: dict[str, Any]) -> list[list[float]]:
    """Row d: the loss of each sequence if its label were d."""
    model, held_out, _, ranks = prepare(config)
    model.eval()
    rows = []
    for domain in range(3):
        losses = []
        for share in held_out.first(PER_DOMAIN).shares(ranks, 1, 0):
            share.context.domain_BL.fill_(domain)
            losses.append(float(model(share.context, share.targets_BL).cross_entropy_BL.double().mean()))
        rows.append(losses)
    return rows


def test_a_router_that_reads_labels_is_told_another(
    config: dict[str, Any], run_on_ranks: Callable[..., list[Any]]
) -> None:
    config["routing"] = {"router": {"name": "reference"}}
    (arrays,) = run_on_ranks(ablate, 1, config)
    (expected,) = run_on_ranks(losses_under_labels, 1, config)
    np.testing.assert_allclose(arrays["forced_loss_DN"], expected, rtol=TOLERANCE)
    own = arrays["forced_loss_DN"][arrays["sequence_domain_N"], np.arange(3 * PER_DOMAIN)]
    np.testing.assert_allclose(own, arrays["baseline_loss_N"], rtol=TOLERANCE)
    assert np.abs(arrays["forced_loss_DN"][0] - arrays["forced_loss_DN"][1]).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "router"),
    [
        ({"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 1}, {"name": "top_k"}),
        ({"split": 2, "expert_hidden_size": 16}, {"name": "top_p"}),
        ({"top_k": 8}, {"name": "sigmoid"}),
        ({}, {"name": "expert_choice"}),
        ({}, {"name": "random"}),
    ],
)
def test_whatever_is_routed_can_be_ablated(
    model: dict[str, Any], router: dict[str, Any], config: dict[str, Any], run_on_ranks: Callable[..., list[Any]]
) -> None:
    config["model"] = config["model"] | {"moe": config["model"]["moe"] | model}
    config["routing"] = {"router": router}
    (arrays,) = run_on_ranks(ablate, 1, config)
    assert np.isfinite(arrays["baseline_loss_N"]).all() and np.isfinite(arrays["ablation_loss_YEN"]).all()
    free = sum(number for name, number in model.items() if name.startswith("num_"))
    # An expert without neurons has no weights to compare.
    assert np.isnan(arrays["weight_cosine_YEE"]).any(axis=2).all(axis=0).tolist() == [bool(free)] * (
        len(arrays["owner_YE"][0])
    )


def one_decision(config: dict[str, Any]) -> dict[str, Any]:
    """Losses without expert 0 of layer 1 (all its choices fall away), by zeroing that expert's output."""
    model, held_out, _, ranks = prepare(config)
    model.eval()
    shares = list(held_out.first(PER_DOMAIN).shares(ranks, 1, 0))
    with torch.no_grad():
        model.moe_layers()[1].deepspeed_moe.experts.down[0].zero_()
        return {
            "losses": [float(model(s.context, s.targets_BL).cross_entropy_BL.double().mean()) for s in shares],
        }


def test_a_layer_without_a_router_of_its_own_has_no_next_best(
    config: dict[str, Any], run_on_ranks: Callable[..., list[Any]]
) -> None:
    config["routing"] = {"router": {"name": "top_k"}, "depth": "global"}
    (arrays,) = run_on_ranks(ablate, 1, config)
    (expected,) = run_on_ranks(one_decision, 1, config)
    np.testing.assert_allclose(arrays["ablation_loss_YEN"][1, 0], expected["losses"], rtol=TOLERANCE)


def test_of_many_experts_an_even_sample_is_ablated() -> None:
    assert ablated_experts(2, 3) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    chosen = ablated_experts(16, 64)
    assert len(set(chosen)) == len(chosen) == MOST_EXPERTS
    numbers = [64 * y + e for y, e in chosen]
    assert set(np.diff(numbers)) == {4}
