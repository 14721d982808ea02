"""Counts, tensor by tensor, what a training holds and sends: the planner's oracle. It runs on the ranks of
tests/processes, so that it imports nothing from ``tests``."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
from moe_testbed.launcher.train.engine import build_engine, build_model
from moe_testbed.launcher.train.inputs import InputMaker, build_sampler
from moe_testbed.model.language_model import LanguageModel

# Where torch.distributed's functions take the tensor whose bytes the plan speaks of.
MEASURED = {
    "all_reduce": (0, "tensor"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_to_all_single": (1, "input"),
}
OTHERS = ["all_gather", "all_to_all", "broadcast", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor"]
SMALL = 1024
"""Bytes: the planner leaves out all-reduces below that, of counts and norms."""


def count(options: dict[str, Any]) -> dict[str, Any]:
    """Trains two steps as the loop does, and counts in the second.

    Returns:
        ``names``: shapes of the parameters by name. Bytes of ``parameters``, ``gradients`` (before the last
        micro-batch), ``optimizer_state`` (without counters of steps) and ``activations`` (of the first micro-batch,
        between forward and backward). ``sent``: bytes by (collective, ranks). ``small``: the largest all-reduce
        that is not among them.
    """
    config = ExperimentConfig.model_validate(options)
    listener, ranks = _Listener(), Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), dist.group.WORLD)
    store = build_store(config.data.mix, Path(config.data.cache_dir), print)
    model, sampler = build_model(config, store, ranks), build_sampler(config, store)
    make_input = InputMaker.for_training(config, store)
    counted: dict[str, Any] = {"names": {name: tuple(p.shape) for name, p in model.named_parameters()}}
    engine = build_engine(model, config, ranks)
    size, accumulation = micro_batch_size(config, ranks.size), accumulation_steps(config, ranks.size)
    for step in range(2):
        listener.on = step == 1
        batches = []
        for micro in range(accumulation):
            start = (micro * ranks.size + ranks.rank) * size
            rows = sampler.batch(step, start, start + size)
            batches.append(make_input(rows, slice(None), step, ranks.device).arguments)
        if model.reads_counts_ahead and accumulation > 1:
            model.begin_step(context for context, _ in batches)
        for micro, (context, targets_BL) in enumerate(batches):
            if step and micro == 0:
                counted["activations"], output = _held(lambda c=context, t=targets_BL: engine(c, t), model)
            else:
                output = engine(context, targets_BL)
            engine.backward(output.loss)
            if micro == accumulation - 2:
                counted["gradients"] = _bytes(_gradients(engine, config.training.zero_stage))
            engine.step()
        model.finish_step()
    counted["parameters"] = _bytes(model.parameters())
    optimizer = engine.optimizer
    basic = optimizer.optimizer if config.training.zero_stage else optimizer
    states = [value for state in basic.state.values() for name, value in state.items() if name != "step"]
    # DeepSpeed has an optimizer of its own for ZeRO 1 in bfloat16, with other names.
    copies = optimizer.state_dict()["single_partition_of_fp32_groups"] if config.training.zero_stage else []
    counted["optimizer_state"] = _bytes([*states, *copies])
    return counted | {"sent": dict(listener.sent), "small": listener.small}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _gradients(engine: Any, stage: int) -> list[Tensor]:
    """What lies on the parameters, and where an optimizer of ZeRO keeps gradients: as a list, or as one flat tensor."""
    optimizer = engine.optimizer
    kept = [p.grad for p in engine.module.parameters() if p.grad is not None]
    if stage == 2:
        kept += [gradient for group in optimizer.all_grad_tensors.values() for gradient in group or []]
        kept += [group.flat_partition for group in optimizer.averaged_gradients.values() if group is not None]
    elif stage == 1:
        kept += getattr(optimizer, "fp32_groups_gradients_flat", [])
    return kept


def _held(forward: Callable[[], Any], model: LanguageModel) -> tuple[int, Any]:
    """Bytes of all storages that a forward pass leaves behind for the backward pass or its caller; its result.

    Where blocks are recomputed, what an encoder returned lies in their arguments, which no hook sees.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    returned: list[weakref.ref[Tensor]] = []
    hooks = [
        stack.register_forward_hook(lambda _, __, result: returned.append(weakref.ref(result[0])))
        for stack in model.stacks.values()
    ]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    for hook in hooks:
        hook.remove()
    for reference in returned:
        if (tensor := reference()) is not None:
            keep(tensor)
    for tensor in _tensors(output):
        keep(tensor)
    return sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in own), output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


class _Listener:
    """Adds up what is handed to torch.distributed while it is on, where it goes to other ranks."""

    def __init__(self) -> None:
        self.on = False
        self.sent: Counter[tuple[str, int]] = Counter()
        self.small = 0
        # DeepSpeed keeps some of the functions from its start on, so that they are replaced before.
        for name in (*MEASURED, *OTHERS):
            setattr(dist, name, self._counted(name, getattr(dist, name)))

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            ranks = dist.get_world_size(next((a for a in _groups(arguments, options)), None))
            if self.on and ranks > 1:
                assert name in MEASURED, f"the plan knows nothing of {name}"
                place, keyword = MEASURED[name]
                size = _bytes([options[keyword] if keyword in options else arguments[place]])
                if name == "all_reduce" and size < SMALL:
                    self.small = max(self.small, size)
                else:
                    self.sent[name, ranks] += size
            return function(*arguments, **options)

        return call


def _groups(arguments: tuple[Any, ...], options: dict[str, Any]) -> Iterator[dist.ProcessGroup]:
    for argument in (*arguments, *options.values()):
        if isinstance(argument, dist.ProcessGroup):
            yield argument
