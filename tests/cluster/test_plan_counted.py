"""The plan's bytes against bytes counted in real trainings over gloo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.layout import layout_of
from moe_testbed.launcher.cluster.plan.activations import planned_activations
from moe_testbed.launcher.cluster.plan.memory import ELEMENT_SIZES, optimizer_groups, touched_numbers
from moe_testbed.launcher.cluster.plan.plan import make_plan
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
from tests.cluster import counting

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

# Counted above the plan: casts of small weights, the balancers' means.
ACTIVATION_TOLERANCE = 0.02
COLLECTIVES = {"all-to-all": "all_to_all_single", "all-reduce": "all_reduce", "all-gather": "all_gather_into_tensor"}

MOE = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 16}
DENSE_BETWEEN = {"num_layers": 4, "moe": MOE | {"every": 2, "num_shared_experts": 1, "split": 2}}
CAPACITY = {"moe": MOE | {"dispatch": "capacity", "capacity_factor": 1.5}}
BASELINE = {"dense_baseline": True}

CASES: list[tuple[int, int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # ranks, expert-parallel size, model, training, router
    (2, 1, {}, {"zero_stage": 0, "gradient_clipping": 0.0}, {}),
    (2, 2, {}, {"zero_stage": 0, "gradient_clipping": 0.0}, {}),
    (2, 1, {}, {"zero_stage": 1, "precision": "bfloat16"}, {}),
    (2, 2, DENSE_BETWEEN, {"zero_stage": 1}, {}),
    (2, 1, DENSE_BETWEEN, {"zero_stage": 2}, {}),
    (2, 2, {}, {"zero_stage": 2, "precision": "bfloat16", "activation_checkpointing": True}, {}),
    (2, 2, CAPACITY, {"zero_stage": 1}, {}),
    (2, 2, {}, {"zero_stage": 1}, {"name": "hash"}),
    (2, 1, {}, {"zero_stage": 1}, {"name": "sinkhorn", "pool": "data_parallel"}),
    (2, 1, BASELINE, {"zero_stage": 2}, {}),
]
ENCODER = {"model": {"architecture": "encoder"}, "objective": {"name": "masked"}}
BOTH = {"model": {"architecture": "encoder_decoder"}, "objective": {"name": "denoising", "rate": 0.3}}
THAWED = {**BOTH, "freeze": {"encoder": {"until": 0.5}}}
APART = {"embeddings": "separate", "encoder": {"num_layers": 3}, "decoder": {"dense_baseline": True}}
POOLED = {"router": {"name": "sinkhorn", "pool": "data_parallel"}}
ARCHITECTURES: list[tuple[int, int, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # as above, and what makes it another architecture
    (2, 1, BASELINE, {"zero_stage": 1}, {}, ENCODER),
    (2, 2, {}, {"zero_stage": 1}, {}, ENCODER),
    (2, 1, {}, {"zero_stage": 2, "precision": "bfloat16", "activation_checkpointing": True}, {}, ENCODER),
    (2, 1, BASELINE, {"zero_stage": 2}, {}, BOTH),
    (2, 2, {}, {"zero_stage": 1}, {}, BOTH),
    (2, 2, {}, {"zero_stage": 2, "precision": "bfloat16", "activation_checkpointing": True}, {}, BOTH),
    (2, 2, DENSE_BETWEEN, {"zero_stage": 1}, {}, THAWED),
    (2, 1, BASELINE, {"zero_stage": 2, "precision": "bfloat16"}, {}, THAWED),
    (2, 2, APART, {"zero_stage": 1}, {}, BOTH),
    (2, 2, CAPACITY, {"zero_stage": 0, "gradient_clipping": 0.0}, {}, BOTH),
    (2, 1, {}, {"zero_stage": 1}, {}, {**BOTH, "routing": {"encoder": POOLED}}),
]
FOUR_RANKS = [
    (4, ep, {}, {"zero_stage": stage, "gradient_clipping": 0.0}, {}) for ep in (1, 2, 4) for stage in (0, 1, 2)
]


@pytest.mark.parametrize(
    ("ranks", "expert_parallel_size", "model", "training", "router"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in FOUR_RANKS)],
)
def test_the_plan_is_what_a_training_holds_and_sends(
    ranks: int,
    expert_parallel_size: int,
    model: dict[str, Any],
    training: dict[str, Any],
    router: dict[str, Any],
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
) -> None:
    options = experiment(make_experiment, ranks, expert_parallel_size, model, training, router, {})
    assert_planned(options, ranks, run_on_ranks(counting.count, ranks, options))


@pytest.mark.parametrize(
    ("ranks", "expert_parallel_size", "model", "training", "router", "parts"),
    ARCHITECTURES,
    ids=lambda value: value["model"]["architecture"] if isinstance(value, dict) and "objective" in value else None,
)
def test_the_plan_of_an_encoder_is_what_a_training_holds_and_sends(
    ranks: int,
    expert_parallel_size: int,
    model: dict[str, Any],
    training: dict[str, Any],
    router: dict[str, Any],
    parts: dict[str, Any],
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
) -> None:
    options = experiment(make_experiment, ranks, expert_parallel_size, model, training, router, parts)
    assert_planned(options, ranks, run_on_ranks(counting.count, ranks, options))


def experiment(
    make_experiment: MakeExperiment,
    ranks: int,
    expert_parallel_size: int,
    model: dict[str, Any],
    training: dict[str, Any],
    router: dict[str, Any],
    parts: dict[str, Any],
) -> dict[str, Any]:
    """A config of a small model with two micro-batches a step on each rank."""
    balance = {"load_balancing_loss": {"coefficient": 0.1}}
    routing = {"router": router or {"name": "top_k"}, "balance": {} if router else balance}
    return make_experiment(
        **{
            **parts,
            "data": make_experiment()["data"] | {"sequence_length": 64},
            "model": {"num_layers": 2, "hidden_size": 64, "num_heads": 2, "moe": MOE} | model | parts.get("model", {}),
            "training": {"micro_batch_size": 2, "global_batch_size": 4 * ranks} | training,
            "parallel": {"expert_parallel_size": expert_parallel_size},
            "routing": routing | parts.get("routing", {}),
        }
    )


def assert_planned(options: dict[str, Any], ranks: int, counted: list[dict[str, Any]]) -> None:
    """The plan of these options is what was counted on each rank."""
    config = ExperimentConfig.model_validate(options)
    plan = make_plan(config, cluster_of(ranks))

    # 1. Weights: the same names and shapes, in the same order.
    for rank in counted:
        assert list(rank["names"].items()) == [(weight.name, weight.shape) for weight in plan.weights]

    # 2. What is held all the time, to the byte.
    layout, element = layout_of(config, plan.cluster), ELEMENT_SIZES[config.training.precision]
    in_float32 = config.training.precision == "float32"
    assert {rank["parameters"] for rank in counted} == {plan.memory.parameters}
    assert {rank["optimizer_state"] for rank in counted} == {plan.memory.optimizer_state}
    assert max(rank["gradients"] for rank in counted) == plan.memory.gradients
    if config.training.zero_stage == 2 and in_float32:
        touched = touched_numbers(optimizer_groups(plan.weights, layout), layout)
        assert [rank["gradients"] for rank in counted] == [4 * numbers for numbers in touched]

    # 3. What is sent: bytes of all ranks, so that it does not matter which experts are used more.
    assert accumulation_steps(config, ranks) == 2
    sent: Counter[tuple[str, int]] = Counter()
    for rank in counted:
        sent.update(rank["sent"])
    planned: Counter[tuple[str, int]] = Counter()
    for traffic in plan.traffic:
        planned[COLLECTIVES[traffic.collective], traffic.ranks] += traffic.handed * ranks
    assert sent == planned

    # 4. Activations, of which the mean over ranks does not depend on the routing either.
    activations = planned_activations(config, micro_batch_size(config, ranks), element, "cpu")
    held = sum(rank["activations"] for rank in counted) / ranks
    assert activations.held(config.training.activation_checkpointing) == pytest.approx(held, rel=ACTIVATION_TOLERANCE)


def cluster_of(ranks: int) -> ClusterConfig:
    """One node of processes."""
    return ClusterConfig.model_validate(
        {
            "name": "gloo",
            "nodes": 1,
            "gpus_per_node": ranks,
            "accelerator": "cpu",
            "gpu_memory_gb": 1,
            "interconnect": {"within_node_gb_per_s": 1, "between_nodes_gb_per_s": 1},
            "launcher": "deepspeed",
        }
    )
