"""What the children do: train an expert in the first step alone, and tell its weights after every step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.rendezvous import join
from moe_testbed.launcher.train.engine import build_engine, build_model
from moe_testbed.launcher.train.inputs import MicroBatches
from moe_testbed.routing.records import RoutingContext
from moe_testbed.routing.router import Scores
from moe_testbed.routing.routers.top_k import TopK


class UsesItOnce(TopK):
    """Gives expert 0 no token after the first step."""

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        logits_TE = self.scorer(x_TM)
        if context.step > 0:
            logits_TE[:, 0] = -1e9
        return Scores.by_softmax(logits_TE)


def train(config: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[int]]:
    """Trains by the engine.

    Returns:
        Expert 0's part of the first step's gradient; its weights before the first step and after each; and how many
        tokens each step sent to it.
    """
    experiment = ExperimentConfig.model_validate(config)
    ranks = join(torch.device("cpu"), 60.0)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    inputs, model = MicroBatches(experiment, store, ranks), build_model(experiment, store, ranks)
    # The gradient comes from autograd alone: a model of its own, which no engine has touched.
    other = build_model(experiment, store, ranks)
    for context, targets_BL in inputs.of_step(0):
        other(context, targets_BL).loss.backward()
    gradient = other.moe_layers()[0].experts.down.grad[0]

    engine, expert = build_engine(model, experiment, ranks), model.moe_layers()[0].experts.down
    weights, tokens = [expert[0].detach().clone()], []
    for step in range(experiment.training.steps):
        for context, targets_BL in inputs.of_step(step):
            output = engine(context, targets_BL)
            engine.backward(output.loss)
            engine.step()
            tokens.append(int((output.layers[0].decision.expert_ids_TK == 0).sum()))
        weights.append(expert[0].detach().clone())
    return gradient, weights, tokens
