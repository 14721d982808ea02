"""The weights of one rank, counted from the model itself, which is built on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import model_on_meta


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Attributes:
        name: as the model calls it.
        expert: held by some ranks only.
        part: the stack with which it is frozen; empty where none is ever frozen.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    expert: bool = False
    part: str = ""

    @property
    def size(self) -> int:
        """How many numbers are in it."""
        return math.prod(self.shape)


def rank_weights(config: ExperimentConfig) -> list[Weight]:
    """Returns all weights that a rank holds, in the model's order. Ranks hold different experts of equal shapes.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    model, is_frozen = model_on_meta(config), bool(config.freeze.parts())
    return [
        Weight(
            name,
            tuple(parameter.shape),
            parameter.requires_grad,
            expert=not getattr(parameter, "allreduce", True),
            part=model.part_of(name) if is_frozen else "",
        )
        for name, parameter in model.named_parameters()
    ]
