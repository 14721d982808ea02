"""How large a model is, counted from the model itself, which may be on the meta device: there it has shapes alone.

Shape legend: D domains, V token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from moe_testbed.data.objectives import NextToken, Objective, SpecialIds
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.flops import StepFlops
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.moe import MoELayer
from moe_testbed.routing.records import RouterSetting

_NEXT_TOKEN = NextToken()


@dataclass(frozen=True)
class ModelSize:
    """Parameters and arithmetic of a model.

    Attributes:
        parameters: all of them, those of all ranks' experts included.
        active_parameters: those that one token uses, if none of its choices is a zero-computation expert.
        flops_per_token: floating point operations of forward and backward for one token of the text, with nothing
            frozen, see `config.flops`.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int


def size_of(model: LanguageModel, sequence_length: int, objective: Objective = _NEXT_TOKEN) -> ModelSize:
    """Counts the whole model; this one may hold its rank's experts alone."""
    moe = model.config.moe
    total = active = _numbers(model)
    for layer in model.moe_layers():
        held = layer.experts.num_experts
        expert = _numbers(layer.experts) // held
        total += (moe.num_ffn_experts - held) * expert
        active += (moe.choices - held) * expert
    step = StepFlops(model, objective, sequence_length, sequences=1)
    flops = sum(step.stacks().values()) + step.output(frozenset(), round(objective.mean_targets(sequence_length)))
    return ModelSize(total, active, flops // sequence_length)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def special_ids(config: ExperimentConfig, pieces: int) -> SpecialIds:
    """Returns the token ids that stand for no text, for a tokenizer of so many pieces."""
    return config.objective.special_ids(pieces, config.data.sequence_length)


def language_model(
    config: ExperimentConfig,
    pieces: int,
    setting: RouterSetting,
    moe_layer: type[MoELayer] = MoELayer,
) -> LanguageModel:
    """Returns the model of an experiment, on the default device.

    Args:
        pieces: ids of the tokenizer.
        setting: what the router of the first MoE layer is built for; the data-parallel group in it is the model's.
        moe_layer: class of its MoE layers.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    ids = special_ids(config, pieces)
    everything = config.objective.all_ids_are_targets
    rows, output_ids = (pieces, None) if everything else (ids.rows, config.objective.targets(ids))
    # No text has the ids that stand for none.
    counts_DV = F.pad(setting.token_counts_DV, (0, rows - pieces))
    try:
        return LanguageModel(
            config.model,
            config.routing,
            lambda layer: replace(setting, layer=layer, token_counts_DV=counts_DV),
            rows,
            max(config.objective.lengths(config.data.sequence_length).values()),
            config.seed,
            config.parallel.expert_parallel_size,
            setting.data_parallel_group,
            config.training.activation_checkpointing,
            moe_layer,
            output_ids,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def model_on_meta(config: ExperimentConfig) -> LanguageModel:
    """Returns the model as one rank has it, with shapes alone. Raises ConfigError as `language_model`."""
    # Outside of the meta device, since routers may look at the counts.
    setting = first_setting(config)
    with torch.device("meta"):
        return language_model(config, config.data.mix.vocab_size, setting)


def first_setting(config: ExperimentConfig) -> RouterSetting:
    """Returns what the router of the first MoE layer is built for, where nothing is known of the tokens."""
    domains = config.data.mix.domain_weights()
    total = sum(domains.values())
    return RouterSetting(
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


def setting_on(config: ExperimentConfig, store: Store, group: dist.ProcessGroup | None = None) -> RouterSetting:
    """Returns what the router of the first MoE layer is built for, with what a store knows of the tokens.

    Args:
        group: the ranks over which the batch is spread; None for one process.
    """
    weights = [config.data.mix.domain_weights()[domain] for domain in store.domains]
    return replace(
        first_setting(config),
        domains=store.domains,
        # They sum to 1: domains that could not be had are left out.
        domain_weights=tuple(weight / sum(weights) for weight in weights),
        token_counts_DV=torch.from_numpy(store.token_counts("train")),
        data_parallel_group=group,
    )
