"""The model of an experiment, and DeepSpeed's engine around it with its learning rates."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from typing import Any

from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig, TrainingConfig
from moe_testbed.launcher.config.model_size import language_model, setting_on
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
from moe_testbed.launcher.train.stages.freezing import PART, share_of_rate
from moe_testbed.model.deepspeed_moe import RoutedMoE, create_expert_parallel_groups, deepspeed
from moe_testbed.model.language_model import LanguageModel


def build_model(config: ExperimentConfig, store: Store, ranks: Ranks) -> LanguageModel:
    """Returns the model on its device.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    setting = setting_on(config, store, ranks.group)
    return language_model(config, store.vocab_size, setting, RoutedMoE).to(ranks.device)


def deepspeed_config(config: ExperimentConfig, num_ranks: int) -> dict[str, Any]:
    """Returns DeepSpeed's config. Everything that it would choose by itself and that changes results is written out.

    Gradients are added up over micro-batches in float32, in bfloat16 too, where DeepSpeed would do so in bfloat16; they
    are sent in the model's precision.
    """
    training = config.training
    in_bfloat16 = training.precision == "bfloat16"
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size(config, num_ranks),
        "gradient_accumulation_steps": accumulation_steps(config, num_ranks),
        "gradient_clipping": training.gradient_clipping,
        "zero_optimization": {"stage": training.zero_stage},
        # Without the immediate update, ZeRO 1 in bfloat16 adds each micro-batch's gradient to those before it again and
        # again: it clears them by a hook on the model's output, which DeepSpeed does not find in a dataclass.
        "bf16": {"enabled": in_bfloat16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "bf16" if in_bfloat16 else "fp32",
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": training.learning_rate,
                "betas": list(training.betas),
                "weight_decay": training.weight_decay,
                # DeepSpeed's own Adam would be compiled at first use.
                "torch_adam": True,
                "fused": True,
            },
        },
        "steps_per_print": 2**62,
    }


def _parameter_groups(model: LanguageModel, config: ExperimentConfig) -> list[dict[str, Any]]:
    """Returns the parameters in groups: weights, which are decayed, and norms, which are not; each part that is frozen
    for a while apart, since its learning rate is another one."""
    frozen = config.freeze.parts()
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = model.part_of(name) if frozen else ""
        kind, decay = ("decayed", config.training.weight_decay) if parameter.ndim > 1 else ("not_decayed", 0.0)
        key = f"{part}.{kind}" if part else kind
        group = groups.setdefault(key, {"name": key, "params": [], "weight_decay": decay, PART: part})
        group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: (group[PART], group["name"]))


def build_engine(model: LanguageModel, config: ExperimentConfig, ranks: Ranks) -> Any:
    """Returns the engine around the model: optimizer, gradient accumulation, clipping, precision, ZeRO and
    expert-parallel groups."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch is about to drop, and would say so once per rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed", category=FutureWarning)
    create_expert_parallel_groups(config.parallel.expert_parallel_size)
    # In bfloat16 it prints the use of memory before and after each group of parameters.
    with contextlib.redirect_stdout(io.StringIO()):
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=_parameter_groups(model, config),
            config=deepspeed_config(config, ranks.size),
            dist_init_required=False,
        )
    return engine


def set_learning_rate(engine: Any, config: ExperimentConfig, step: int) -> float:
    """Sets the rate of the update that follows ``step`` completed ones, and returns that of what is not frozen."""
    rate = learning_rate(config.training, step)
    for group in engine.optimizer.param_groups:
        # Groups of checkpoints from before parts could be frozen are of no part.
        group["lr"] = rate * share_of_rate(config, group.get(PART, ""), step)
    return rate


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Returns the rate of the update that follows ``step`` completed ones: linear warm-up, then cosine to
    ``final_learning_rate_ratio``.

    It is a function of the step alone, so that nothing of it has to be saved.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps) / max(training.steps - training.warmup_steps - 1, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    ratio = training.final_learning_rate_ratio
    return training.learning_rate * (ratio + (1 - ratio) * cosine)
