"""The start of a model's parameters, and what of them is refused.

The start depends on (seed, parameter name, expert number) alone, and so on nothing that was drawn before.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_testbed.model.moe import MoELayer


@torch.no_grad()
def initialise(model: nn.Module, seed: int, writers: Mapping[str, int]) -> None:
    """Draws all parameters of a model but its routers', which draw their own.

    Draws are normal with variance 1 / fan-in; the layers that write to the residual stream are scaled by
    ``1 / sqrt(number of them)``.

    Args:
        writers: how many layers write to the residual stream of each stack, by the stack's name; a single stack's name
            need not stand in front of its parameters' names.
    """
    for name, module in model.named_modules():
        stack = name.partition(".")[0]
        residual = (writers[stack] if stack in writers else next(iter(writers.values()))) ** -0.5
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


def refuse_expert_names(model: nn.Module) -> None:
    """Guards against DeepSpeed's checkpoints, which take every entry of an MoE layer with "expert" in its name for an
    expert's, and cannot save it if it is none. Outside of MoE layers, as in a router, any name is safe.

    Raises:
        ValueError: a parameter or buffer of an MoE layer has such a name.
    """
    for layer, module in model.named_modules():
        if not isinstance(module, MoELayer):
            continue
        for name in module.state_dict():
            if "expert" in name and not name.startswith("deepspeed_moe.experts."):
                raise ValueError(
                    f"'{layer}.{name}' lies in an MoE layer and has 'expert' in its name, and DeepSpeed's checkpoints "
                    "would take it for an expert's; rename it, or keep it outside of the layer"
                )


def refuse_scalars(model: nn.Module) -> None:
    """Guards against DeepSpeed's broadcast of the initial weights, which cannot send a parameter without dimensions.

    Raises:
        ValueError: there is one.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise ValueError(
                f"the parameter '{name}' has no dimensions, and DeepSpeed cannot send it between ranks; give it the "
                "shape [1]"
            )
