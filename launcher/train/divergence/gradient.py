"""The norm of a step's gradient, which must be known before the weights change."""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from moe_testbed.model.language_model import LanguageModel


def update(engine: Any, model: LanguageModel) -> float:
    """Lets the engine make its step after a micro-batch: after the last one of an optimizer step it updates the
    weights, unless the gradient is not finite.

    Returns:
        The norm of the gradient of all ranks before clipping, the same on all of them; nan before the last micro-batch.
    """
    if not engine.is_gradient_accumulation_boundary():
        engine.step()
        return math.nan
    if engine.zero_optimization():
        # DeepSpeed finds the norm, and leaves the weights as they are where that is not finite.
        engine.step()
        return float(engine.get_global_grad_norm())
    norm = gradient_norm(model)
    if math.isfinite(norm):
        engine.step()
    return norm


def gradient_norm(model: LanguageModel) -> float:
    """Returns the norm of the gradients that lie at the parameters, of all ranks together.

    The ranks have the same gradient of what they share; that of an expert lies on the ranks that hold it.
    """
    moe_layers = model.moe_layers()
    of_experts = {id(parameter) for moe in moe_layers for parameter in moe.experts.parameters()}
    shared: list[Tensor] = []
    own: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.grad is not None:
            (own if id(parameter) in of_experts else shared).append(parameter.grad)
    square_of_own: Tensor = get_total_norm(own).to(shared[0].device) ** 2
    if moe_layers and moe_layers[0].group is not None:
        dist.all_reduce(square_of_own, group=moe_layers[0].group)
    return math.sqrt(float(get_total_norm(shared) ** 2 + square_of_own))
