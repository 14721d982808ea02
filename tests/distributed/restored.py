"""What the children do: restore a checkpoint as training does, and tell what they hold then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.checkpoint import checkpoints
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.rendezvous import join
from moe_testbed.launcher.train.engine import build_engine, build_model


def restore(config: dict[str, Any], run_dir: str) -> dict[str, Tensor]:
    """Weights and buffers, and for each parameter what DeepSpeed finds of its optimizer's state on all ranks; of
    experts, those of this rank."""
    experiment = ExperimentConfig.model_validate(config)
    ranks = join(torch.device("cpu"), experiment.parallel.slow_timeout_seconds)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    model = build_model(experiment, store, ranks)
    engine = build_engine(model, experiment, ranks)
    checkpoints.restore(engine, Path(run_dir) / "checkpoints", ranks, experiment.parallel.expert_parallel_size)
    held = {f"module/{name}": value for name, value in (*model.named_parameters(), *model.named_buffers())}
    if engine.zero_optimization():
        # The next step would do so.
        engine.optimizer._lazy_init_hp_params_optimizer_state()
        steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    else:
        steps = {float(state["step"]) for state in engine.optimizer.state.values()}
    held["step"] = torch.tensor(sorted(steps))
    for name, parameter in model.named_parameters():
        if engine.zero_optimization():
            held[f"weights/{name}"] = safe_get_full_fp32_param(parameter)
        for key in ("exp_avg", "exp_avg_sq"):
            held[f"{key}/{name}"] = (
                safe_get_full_optimizer_state(parameter, key)
                if engine.zero_optimization()
                else engine.optimizer.state[parameter][key]
            )
    return {name: value.detach().clone() for name, value in held.items()}
