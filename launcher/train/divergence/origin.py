"""Where it began: the first layer whose output, or the last one whose gradient, is not finite.

It is looked for after the fact, by running the step's batch once more on the same weights. All ranks do this together,
since experts may lie on several of them; each looks at its own share of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.guard import not_finite
from moe_testbed.routing.records import RoutingContext, RoutingDecision

MicroBatch = tuple[RoutingContext, Tensor]


@dataclass(frozen=True, order=True)
class Origin:
    """The place that a rank has found.

    Attributes:
        order: what began earlier has a lower one.
        words: the place, and what is wrong there.
    """

    order: float
    words: str


def origin_of_loss(model: LanguageModel, batches: Iterable[MicroBatch], ranks: Ranks) -> str:
    """Returns in words the layer where a forward pass is first not finite, over all ranks.

    Args:
        batches: this rank's; every rank has as many.
    """
    # What sick weights of one rank make may come to light on another one.
    found = origin_of_weights(model, (), ranks) or _earliest(_first_output(model, batches), ranks)
    return found or "what balancers or routers keep: computed once more, all layers are finite"


def origin_of_gradient(model: LanguageModel, batches: Iterable[MicroBatch], ranks: Ranks) -> str:
    """Returns in words the layer where the backward pass is first not finite. Arguments as for `origin_of_loss`."""
    return _earliest(_last_gradient(model, batches), ranks) or ""


def origin_of_weights(model: LanguageModel, batches: Iterable[MicroBatch], ranks: Ranks) -> str:
    """Returns in words the first layer with a weight that is not finite, over all ranks; no batch is needed."""
    return _earliest(_first_weight(model), ranks) or ""


def _first_weight(model: nn.Module) -> Origin | None:
    for place, (name, parameter) in enumerate(model.named_parameters()):
        if not parameter.isfinite().all():
            return Origin(place, f"{name}, a weight that is not finite")
    return None


@torch.no_grad()
def _first_output(model: LanguageModel, batches: Iterable[MicroBatch]) -> Origin | None:
    """The first module, of those inside one another the innermost, whose output is not finite."""
    found: list[Origin] = []
    completed = 0

    def watch(name: str, module: nn.Module, output: Any) -> None:
        nonlocal completed
        completed += 1
        if not found and (problem := _problem(output)):
            found.append(Origin(completed, f"{name or 'the logits'}, which {problem}"))

    handles = [
        module.register_forward_hook(lambda module, _, output, name=name: watch(name, module, output))
        for name, module in model.named_modules()
    ]
    try:
        # All of them, since the other ranks may not have found anything yet.
        for context, targets_BL in batches:
            model(context, targets_BL)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _last_gradient(model: LanguageModel, batches: Iterable[MicroBatch]) -> Origin:
    """The last parameter, in the order of the forward pass, whose gradient is not finite. Backwards it is the first."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    largest_N = torch.zeros(len(named))
    for context, targets_BL in batches:
        loss = model(context, targets_BL).loss
        gradients = torch.autograd.grad(loss, [parameter for _, parameter in named], allow_unused=True)
        highest = [0.0 if gradient is None else float(gradient.abs().max()) for gradient in gradients]
        # torch.maximum hands a nan on.
        largest_N = torch.maximum(largest_N, torch.tensor(highest))
    sick = (~largest_N.isfinite()).nonzero().flatten().tolist()
    if sick:
        return Origin(-sick[-1], f"the gradient of {named[sick[-1]][0]}")
    place = int(largest_N.argmax())
    words = f"the sum of the gradients: that of {named[place][0]} is the largest, up to {float(largest_N[place]):.3g}"
    return Origin(1.0 / (1.0 + float(largest_N[place])), words)


def _earliest(mine: Origin | None, ranks: Ranks) -> str | None:
    found = [mine]
    if ranks.group is not None:
        found = [None] * ranks.size
        dist.all_gather_object(found, mine, group=ranks.group)
    origins = [origin for origin in found if origin is not None]
    return min(origins).words if origins else None


def _problem(output: Any) -> str | None:
    """What is not finite in the output of a module; None if nothing is."""
    if isinstance(output, RoutingDecision):
        problem = not_finite(output)
        return problem and f"{problem} (in a router of your own, look for a division by zero)"
    sick = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and not tensor.isfinite().all()]
    if not sick:
        return None
    return f"returned {int((~sick[0].isfinite()).sum())} NaN or infinite numbers of {sick[0].numel()}"


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returns; the decisions in it have been looked at where they were made."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
    elif is_dataclass(output) and not isinstance(output, RoutingDecision | RoutingContext):
        for field in fields(output):
            yield from _tensors(getattr(output, field.name))
