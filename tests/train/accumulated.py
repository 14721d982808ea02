"""What the children do: the gradient of one optimizer step, by DeepSpeed's engine, and by autograd alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.rendezvous import join
from moe_testbed.launcher.ranks.sharing import shared_among
from moe_testbed.launcher.train.engine import build_engine, build_model
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.model.language_model import LanguageModel


def _build(config: dict[str, Any]) -> tuple[ExperimentConfig, LanguageModel, MicroBatches, Any]:
    experiment = ExperimentConfig.model_validate(config)
    ranks = join(torch.device("cpu"), experiment.parallel.slow_timeout_seconds)
    experiment = shared_among(experiment, ranks.size)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    return experiment, build_model(experiment, store, ranks), MicroBatches(experiment, store, ranks), ranks


def by_autograd(config: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of the whole batch in float32, at the weights rounded to bfloat16."""
    _, model, inputs, _ = _build(config)
    model.bfloat16().float()
    for context, targets_BL in inputs.of_step(0):
        (model(context, targets_BL).loss / inputs.accumulation).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_the_engine(config: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient that Adam's first moment holds after one step: (1 - beta) times it; of experts, those of this
    rank."""
    experiment, model, inputs, ranks = _build(config)
    engine = build_engine(model, experiment, ranks)
    for context, targets_BL in inputs.of_step(0):
        engine.backward(engine(context, targets_BL).loss)
        engine.step()
    # DeepSpeed links the state after the first group's step, when others have none yet, and not again.
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    scale = 1 - experiment.training.betas[0]
    return {
        name: safe_get_full_optimizer_state(parameter, "exp_avg") / scale
        for name, parameter in model.named_parameters()
    }
