"""The most memory that forward and backward pass allocate: the planner's oracle for activations. Runs on a rank of
forkserver.py, so that it imports nothing from ``tests``."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.inputs import InputMaker, build_sampler
from moe_testbed.model.deepspeed_moe import create_expert_parallel_groups


class Allocations(TorchDispatchMode):
    """Bytes of all storages that operators have made, while they live."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata for tensor in known}
        self.now = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.alive:
                storage = tensor.untyped_storage()
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size


def most_allocated(many_options: list[dict[str, Any]]) -> list[int]:
    """Bytes, beside parameters and gradients, of one micro-batch of each experiment."""
    return [_most_allocated(ExperimentConfig.model_validate(options)) for options in many_options]


def _most_allocated(config: ExperimentConfig) -> int:
    store = build_store(config.data.mix, Path(config.data.cache_dir), print)
    create_expert_parallel_groups(1)
    model = build_model(config, store, Ranks(dist.get_rank(), 1, torch.device("cpu"), None))
    if config.training.precision == "bfloat16":
        model = model.bfloat16()
    # As in the last steps.
    model.freeze(config.freeze.frozen_at(config.training.steps - 1, config.training.steps))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = build_sampler(config, store).batch(0, 0, config.training.micro_batch_size)
    make_input = InputMaker.for_training(config, store)
    context, targets_BL = make_input(batch, slice(None), 0, torch.device("cpu")).arguments
    known = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    with Allocations(known) as allocations:
        model(context, targets_BL).loss.backward()
    return allocations.most
