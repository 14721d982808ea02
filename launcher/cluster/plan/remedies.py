"""What would make a training fit that does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.cluster.plan.plan import Plan, make_plan
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.sharing import micro_batch_size


def remedies(plan: Plan) -> list[str]:
    """Overrides of the experiment, each of which makes it fit by itself, the least change of its kind; if there is
    none, one that holds several, or nothing."""
    found: dict[str, str] = {}
    for part, key, value in _changes(plan):
        if key not in found and _fits(plan, _changed(plan.config, part, key, value)):
            found[key] = _override(part, key, value)
    return list(found.values()) or _together(plan)


def _together(plan: Plan) -> list[str]:
    config, strongest = plan.config, {key: (part, value) for part, key, value in _changes(plan)}
    taken: list[str] = []
    for key, (part, value) in strongest.items():
        config = _changed(config, part, key, value)
        taken.append(_override(part, key, value))
        if _fits(plan, config):
            return [" ".join(taken)]
    return []


def _changes(plan: Plan) -> Iterator[tuple[str, str, Any]]:
    """Part, key and value; of each key from the least change to the strongest."""
    config, layout = plan.config, plan.layout
    training = config.training
    if not training.activation_checkpointing:
        yield "training", "activation_checkpointing", True
    for stage in range(training.zero_stage + 1, 3):
        yield "training", "zero_stage", stage
    micro = micro_batch_size(config, layout.world_size)
    while micro % 2 == 0:
        micro //= 2
        yield "training", "micro_batch_size", micro
    # Without ZeRO DeepSpeed clips wrongly where experts are spread.
    if config.model.num_moe_layers and training.zero_stage:
        for size in range(layout.expert_parallel_size + 1, layout.ranks_per_node + 1):
            if layout.ranks_per_node % size == 0 and config.model.moe.num_ffn_experts % size == 0:
                yield "parallel", "expert_parallel_size", size


def _changed(config: ExperimentConfig, part: str, key: str, value: Any) -> ExperimentConfig:
    return config.model_copy(update={part: getattr(config, part).model_copy(update={key: value})})


def _override(part: str, key: str, value: Any) -> str:
    return f"{part}.{key}={str(value).lower()}"


def _fits(plan: Plan, config: ExperimentConfig) -> bool:
    try:
        # Only the expert-parallel size changes what a rank holds.
        weights = plan.weights if config.parallel == plan.config.parallel else None
        return make_plan(config, plan.cluster, weights).fits
    except ConfigError:
        return False
