"""The exact global batch: one batch gives one loss and one gradient, however ranks and micro-batches share it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.rendezvous import join
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, build_sampler
from moe_testbed.model.deepspeed_moe import create_expert_parallel_groups

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]
BATCH = 8


def step_gradient(options: dict[str, Any], estimator: str, accumulation: int) -> tuple[Tensor, Tensor]:
    """Loss and gradient of all parameters for the global batch of step 3, mean over micro-batches and ranks."""
    options["routing"]["balance"] = {
        "load_balancing_loss": {"coefficient": 1.0, "scope": "global_batch", "estimator": estimator}
    }
    config = ExperimentConfig.model_validate(options)
    ranks = join(torch.device("cpu"), timeout_seconds=60.0)
    create_expert_parallel_groups(1)
    store = build_store(config.data.mix, Path(config.data.cache_dir), print)
    sampler, model = build_sampler(config, store), build_model(config, store, ranks)
    size = BATCH // (accumulation * ranks.size)
    starts = [(micro * ranks.size + ranks.rank) * size for micro in range(accumulation)]
    inputs = [LANGUAGE_MODELLING(sampler.batch(3, s, s + size), slice(None), 3, ranks.device).arguments for s in starts]
    if accumulation > 1 and model.reads_counts_ahead:
        model.begin_step(context for context, _ in inputs)
    total = torch.zeros(())
    for context, targets_BL in inputs:
        loss = model(context, targets_BL).loss / accumulation
        loss.backward()
        total += loss.detach()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    for values in (total, gradient):
        dist.all_reduce(values)
    return total / ranks.size, gradient / ranks.size


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 4), (2, 1), (2, 2), (4, 1)])
def test_exact_does_not_depend_on_how_the_batch_is_shared(
    ranks: int, accumulation: int, make_experiment: MakeExperiment, run_on_ranks: Run
) -> None:
    options = make_experiment()
    ((loss, gradient),) = run_on_ranks(step_gradient, 1, options, "exact", 1)
    for shared_loss, shared_gradient in run_on_ranks(step_gradient, ranks, options, "exact", accumulation):
        assert abs(shared_loss - loss) <= 1e-6 * loss
        assert (shared_gradient - gradient).norm() <= 1e-6 * gradient.norm()
    if accumulation > 1:
        # It matters: counting as one goes gives another gradient.
        found = run_on_ranks(step_gradient, ranks, options, "online", accumulation)
        assert (found[0][1] - gradient).norm() > 1e-4 * gradient.norm()
