"""The start of a model's parameters.

It depends on (seed, parameter name, expert number) alone, and so on nothing that was drawn before.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from moe_testbed.model.moe import MoELayer


@torch.no_grad()
def initialise(model: nn.Module, seed: int, num_layers: int) -> None:
    """Draws all parameters of a model but its routers', which draw their own.

    Draws are normal with variance 1 / fan-in; the layers that write to the residual stream are scaled by
    ``1 / sqrt(2 * num_layers)``.
    """
    residual = (2 * num_layers) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            _draw(module.weight, seed, name, module.weight.shape[1] ** -0.5)
        elif isinstance(module, nn.Linear) and ".routing." not in name:
            writes = name.endswith((".output", ".down"))
            _draw(module.weight, seed, name, module.weight.shape[1] ** -0.5 * (residual if writes else 1.0))
        elif isinstance(module, MoELayer):
            experts = module.experts
            for part, scale in (("gate_up", 1.0), ("down", residual)):
                weight = getattr(experts, part)
                for index in range(experts.num_experts):
                    number = module.first_expert + index
                    _draw(weight[index], seed, f"{name}.{number}.{part}", weight.shape[1] ** -0.5 * scale)


def seed_of(seed: int, name: str) -> int:
    """Returns the seed of what has this name in a model that has this seed."""
    return zlib.crc32(f"{seed}/{name}".encode())


def _draw(weight: Tensor, seed: int, name: str, std: float) -> None:
    if weight.is_meta:
        return
    generator = torch.Generator().manual_seed(seed_of(seed, name))
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
