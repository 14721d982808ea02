"""What DeepSpeed could not save or send is refused before it trains; DeepSpeed itself is not needed to tell."""

from __future__ import annotations

from torch import nn

from moe_testbed.model.moe import MoELayer


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
