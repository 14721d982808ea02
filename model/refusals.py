"""What DeepSpeed could not save or send is refused before it trains; DeepSpeed itself is not needed to tell."""

from __future__ import annotations

from torch import nn


def refuse_expert_names(model: nn.Module) -> None:
    """Guards against DeepSpeed's checkpoints, which take every entry with "expert" in its name for an expert's and lose
    the others.

    Raises:
        ValueError: a parameter or buffer outside the experts has such a name.
    """
    for name in model.state_dict():
        if "expert" in name and ".deepspeed_moe.experts." not in name:
            raise ValueError(
                f"'{name}' has 'expert' in its name, and DeepSpeed's checkpoints would lose it; rename the attribute "
                f"(of a router) or the label (of a balancer)"
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
