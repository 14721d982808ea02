"""The weights of one rank, counted from the model itself, which is built on the meta device: it has shapes and no
numbers, and needs neither DeepSpeed nor other ranks.

Shape legend: D domains, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RouterSetting


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Attributes:
        name: as the model calls it.
        expert: held by some ranks only.
    """

    name: str
    shape: tuple[int, ...]
    trainable: bool = True
    expert: bool = False

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def rank_weights(config: ExperimentConfig) -> list[Weight]:
    """All weights that a rank holds, in the model's order. Ranks hold different experts of equal shapes.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    setting_of_layer = _setting(config)
    try:
        with torch.device("meta"):
            model = LanguageModel(
                config.model,
                config.routing,
                setting_of_layer,
                config.data.mix.vocab_size,
                config.data.sequence_length,
                config.seed,
                config.parallel.expert_parallel_size,
            )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [
        Weight(name, tuple(parameter.shape), parameter.requires_grad, expert=not getattr(parameter, "allreduce", True))
        for name, parameter in model.named_parameters()
    ]


def _setting(config: ExperimentConfig) -> Callable[[int], RouterSetting]:
    """What each layer's router is built for."""
    domains = config.data.mix.domain_weights()
    total = sum(domains.values())
    first = RouterSetting(
        num_experts=config.model.moe.num_routed_experts,
        top_k=config.model.moe.choices,
        hidden_size=config.model.hidden_size,
        layer=0,
        seed=config.seed,
        domains=tuple(domains),
        domain_weights=tuple(weight / total for weight in domains.values()),
        # What is learned of the tokens is no weight's shape.
        token_counts_DV=torch.ones(len(domains), config.data.mix.vocab_size, dtype=torch.int64),
    )
    return lambda layer: replace(first, layer=layer)
