"""From an experiment's config to the parts of a training."""

from __future__ import annotations

import torch

from moe_testbed.data.tokens.sampler import Sampler
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RouterSetting


def domain_weights(config: ExperimentConfig, store: Store) -> tuple[float, ...]:
    """Share of each of the store's domains in the mix, sums to 1; domains that could not be had are gone."""
    weights = [config.data.mix.domain_weights()[domain] for domain in store.domains]
    return tuple(weight / sum(weights) for weight in weights)


def build_sampler(config: ExperimentConfig, store: Store) -> Sampler:
    """The training stream."""
    return Sampler(
        store,
        split="train",
        sequence_length=config.data.sequence_length,
        batch_size=config.training.global_batch_size,
        seed=config.seed,
        packing=config.data.packing,
        pieces_per_sequence=config.data.pieces_per_sequence,
        domain_weights=config.data.mix.domain_weights(),
    )


def build_model(config: ExperimentConfig, store: Store, ranks: Ranks) -> LanguageModel:
    """The model on its device.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    weights = domain_weights(config, store)
    token_counts_DV = torch.from_numpy(store.token_counts("train"))

    def setting_of_layer(layer: int) -> RouterSetting:
        return RouterSetting(
            num_experts=config.model.moe.num_routed_experts,
            top_k=config.model.moe.choices,
            hidden_size=config.model.hidden_size,
            layer=layer,
            seed=config.seed,
            domains=store.domains,
            domain_weights=weights,
            token_counts_DV=token_counts_DV,
            data_parallel_group=ranks.group,
        )

    try:
        model = LanguageModel(
            config.model,
            config.routing,
            setting_of_layer,
            store.vocab_size,
            config.data.sequence_length,
            config.seed,
            config.parallel.expert_parallel_size,
            ranks.group,
            config.training.activation_checkpointing,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return model.to(ranks.device)
