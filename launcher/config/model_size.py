"""How large a model is, counted from the model itself, which may be on the meta device: there it has shapes alone.

Shape legend: D domains, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.transformer import RMSNorm
from moe_testbed.routing.records import RouterSetting


@dataclass(frozen=True)
class ModelSize:
    """Parameters and arithmetic of a model.

    Attributes:
        parameters: all of them, those of all ranks' experts included.
        active_parameters: those that one token uses, if none of its choices is a zero-computation expert.
        flops_per_token: floating point operations of forward and backward for one token: six per active parameter that
            takes part in a product, which those of norms do not (the embedding counts once, as the output projection),
            and ``12 * L / 2 * M`` per layer for causal attention over L positions.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int


def size_of(model: LanguageModel, sequence_length: int) -> ModelSize:
    """Counts the whole model; this one may hold its rank's experts alone."""
    moe = model.config.moe
    total = active = _numbers(model)
    for layer in model.moe_layers():
        held = layer.experts.num_experts
        expert = _numbers(layer.experts) // held
        total += (moe.num_ffn_experts - held) * expert
        active += (moe.choices - held) * expert
    norms = sum(_numbers(module) for module in model.modules() if isinstance(module, RMSNorm))
    attention = len(model.blocks) * 6 * sequence_length * model.config.hidden_size
    return ModelSize(total, active, 6 * (active - norms) + attention)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def model_on_meta(config: ExperimentConfig) -> LanguageModel:
    """Returns the model as one rank has it.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    setting_of_layer = router_settings(config)
    try:
        with torch.device("meta"):
            return LanguageModel(
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


def router_settings(config: ExperimentConfig) -> Callable[[int], RouterSetting]:
    """Returns what the router of each layer is built for, where nothing is known of the tokens."""
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
