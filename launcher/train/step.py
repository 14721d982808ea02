"""One optimizer step."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.train.divergence.gradient import update
from moe_testbed.launcher.train.engine import set_learning_rate
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.launcher.train.probe import Probe
from moe_testbed.launcher.train.stages.freezing import hold_still
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.output_layer import NO_TARGET


@dataclass(frozen=True)
class StepValues:
    """What one optimizer step tells.

    Attributes:
        means: means over this rank's micro-batches, tensors without dimensions: loss, cross-entropy and the value of
            each balancer's loss; and how many targets all of them have, where that is not every token. They differ
            among the ranks.
        others: learning rate, tokens per second, and the norm of the gradient before clipping.
    """

    means: dict[str, Tensor]
    others: dict[str, float]


def train_step(
    engine: Any, model: LanguageModel, inputs: MicroBatches, step: int, config: ExperimentConfig, probe: Probe
) -> StepValues:
    """Makes one optimizer step: forward and backward for each micro-batch, then the update.

    Args:
        engine: DeepSpeed's, which holds the model, divides each loss by the number of micro-batches, and sums them up.
        model: the model itself.
        inputs: this rank's micro-batches.
        step: optimizer steps completed before.
        config: learning rates, and which parts are frozen until when.
        probe: counts the micro-batches' routing if it is due after this step.
    """
    started = time.perf_counter()
    hold_still(engine, model, config, step)
    rate = set_learning_rate(engine, config, step)
    if model.reads_counts_ahead and inputs.accumulation > 1:
        model.begin_step(context for context, _ in inputs.of_step(step))

    means: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=engine.device))
    for context, targets_BL in inputs.of_step(step):
        output = engine(context, targets_BL)
        engine.backward(output.loss)
        norm = update(engine, model)
        values = {"loss": output.loss, "cross_entropy": output.cross_entropy}
        values |= {f"balance/{label}": value for label, value in output.balance.items()}
        for name, value in values.items():
            means[name] += value.detach() / inputs.accumulation
        if not config.objective.all_ids_are_targets:
            means["targets"] += (targets_BL != NO_TARGET).sum()
        if probe.is_due(step + 1):
            probe.add(output.layers)
    model.finish_step()

    speed = inputs.tokens_per_step / (time.perf_counter() - started)
    return StepValues(dict(means), {"learning_rate": rate, "tokens_per_second": speed, "gradient_norm": norm})
