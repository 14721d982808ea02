"""DeepSpeed's engine for an experiment."""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

from torch import nn

from moe_testbed.launcher.config import TrainingConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks import Ranks
from moe_testbed.model.deepspeed_moe import create_expert_parallel_groups, deepspeed


def accumulation_steps(training: TrainingConfig, num_ranks: int) -> int:
    """Micro-batches per rank and optimizer step.

    Raises:
        ConfigError: the ranks cannot share the global batch evenly.
    """
    per_round = training.micro_batch_size * num_ranks
    if training.global_batch_size % per_round:
        raise ConfigError(
            f"training.global_batch_size is {training.global_batch_size}, which {num_ranks} ranks with "
            f"training.micro_batch_size "
            f"{training.micro_batch_size} cannot share evenly; make it a multiple of {per_round}"
        )
    return training.global_batch_size // per_round


def check_layout(training: TrainingConfig, expert_parallel_size: int, num_ranks: int) -> None:
    """Raises ConfigError if the ranks cannot share the batch or the experts evenly."""
    accumulation_steps(training, num_ranks)
    if num_ranks % expert_parallel_size:
        raise ConfigError(
            f"parallel.expert_parallel_size is {expert_parallel_size}, which does not divide the number of ranks, "
            f"{num_ranks}; start a multiple of {expert_parallel_size} processes, or lower it"
        )


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Rate of the update that follows ``step`` completed ones: linear warm-up, then cosine to
    ``final_learning_rate_ratio``.

    A function of the step alone, so that nothing of it has to be saved.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    ratio = training.final_learning_rate_ratio
    return training.learning_rate * (ratio + (1 - ratio) * cosine)


def deepspeed_config(training: TrainingConfig, ranks: Ranks) -> dict[str, Any]:
    """What DeepSpeed is told; everything that it would choose by itself and that changes results is written out."""
    accumulation = accumulation_steps(training, ranks.size)
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": training.zero_stage},
        "bf16": {"enabled": training.precision == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": list(training.betas),
                "weight_decay": training.weight_decay,
                # DeepSpeed's own Adam would be compiled at first use.
                "torch_adam": True,
            },
        },
        "steps_per_print": 2**62,
    }


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Norms are not decayed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"name": "decayed", "params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"name": "not_decayed", "params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_engine(model: nn.Module, training: TrainingConfig, expert_parallel_size: int, ranks: Ranks) -> Any:
    """Wraps the model: its optimizer, gradient accumulation, clipping, precision, ZeRO and expert-parallel groups."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to drop, and would say so once per rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed", category=FutureWarning)
    create_expert_parallel_groups(expert_parallel_size)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=_parameter_groups(model, training.weight_decay),
        config=deepspeed_config(training, ranks),
        dist_init_required=False,
    )
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    """Sets the rate of the next update in all parameter groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
