"""The weights of one rank, told from the configuration alone: no model is built, and DeepSpeed is not imported.

Shape legend: D domains, V token ids.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.model.config import ModelConfig
from moe_testbed.routing.records import RouterSetting
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.unit import RouterInput


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
    model, width = config.model, config.model.hidden_size
    routing = _routing_weights(config) if model.num_moe_layers else []
    weights = [Weight("embedding.weight", (config.data.mix.vocab_size, width))]
    decided = False
    for layer in range(model.num_layers):
        block = f"blocks.{layer}"
        weights += [
            Weight(f"{block}.attention_norm.weight", (width,)),
            Weight(f"{block}.attention.query_key_value.weight", (3 * width, width)),
            Weight(f"{block}.attention.output.weight", (width, width)),
            Weight(f"{block}.feed_forward_norm.weight", (width,)),
        ]
        if not model.is_moe_layer(layer):
            weights += _feed_forward(f"{block}.dense", width, model.dense_size(layer))
            continue
        if not decided or config.routing.depth == "layer_wise":
            weights += [Weight(f"{block}.routing.{w.name}", w.shape, w.trainable) for w in routing]
            decided = True
        weights += _experts(f"{block}.moe", model, config.parallel.expert_parallel_size)
        if model.moe.num_shared_experts:
            weights += _feed_forward(f"{block}.shared", width, model.moe.num_shared_experts * model.moe.expert_size)
    return [*weights, Weight("final_norm.weight", (width,))]


def _feed_forward(name: str, width: int, hidden: int) -> Iterator[Weight]:
    for part, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
        yield Weight(f"{name}.{part}.weight", shape)


def _experts(name: str, model: ModelConfig, expert_parallel_size: int) -> Iterator[Weight]:
    moe, width = model.moe, model.hidden_size
    held, hidden = moe.num_ffn_experts // expert_parallel_size, moe.expert_size
    yield Weight(f"{name}.deepspeed_moe.experts.gate_up", (held, width, 2 * hidden), expert=True)
    yield Weight(f"{name}.deepspeed_moe.experts.down", (held, hidden, width), expert=True)
    if constant := moe.num_constant_experts:
        yield Weight(f"{name}.zero_computation.vectors", (constant, width))
        yield Weight(f"{name}.zero_computation.mixing", (2 * constant, width))


def _routing_weights(config: ExperimentConfig) -> list[Weight]:
    """Of one layer's router and what it is shown. They are built, being small, since only a router knows its own."""
    routing, moe, domains = config.routing, config.model.moe, config.data.mix.domain_weights()
    total = sum(domains.values())
    setting = RouterSetting(
        num_experts=moe.num_routed_experts,
        top_k=moe.choices,
        hidden_size=config.model.hidden_size,
        layer=0,
        seed=config.seed,
        domains=tuple(domains),
        domain_weights=tuple(weight / total for weight in domains.values()),
        # What is learned of the tokens is no weight's shape.
        token_counts_DV=torch.ones(len(domains), config.data.mix.vocab_size, dtype=torch.int64),
    )
    try:
        router = ROUTERS.get(routing.router.name)(routing.router, setting)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    shown = RouterInput(
        routing.unit, routing.pooling, routing.first_tokens, routing.input, setting.hidden_size, len(domains)
    )
    parts = nn.ModuleDict({"shown": shown, "router": router})
    return [Weight(name, tuple(p.shape), p.requires_grad) for name, p in parts.named_parameters()]
