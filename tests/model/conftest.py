"""A small language model and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_testbed.model.config import ModelConfig
from moe_testbed.model.deepspeed_moe import RoutedMoE
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.records import RouterSetting, RoutingContext

VOCAB_SIZE = 37
DOMAINS = ("a", "b", "c")
MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "moe": {"num_experts": 12, "top_k": 2, "expert_hidden_size": 8},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., LanguageModel]:
    """Builds a model; keyword arguments replace the model's options, those of ``moe`` one by one."""

    def make(
        routing: dict[str, Any] | None = None, moe: dict[str, Any] | None = None, seed: int = 3, **options: Any
    ) -> LanguageModel:
        checkpointing = options.pop("activation_checkpointing", False)
        expert_parallel_size, moe_layer = options.pop("expert_parallel_size", 1), options.pop("moe_layer", RoutedMoE)
        config = ModelConfig.model_validate({**MODEL, **options, "moe": {**MODEL["moe"], **(moe or {})}})  # type: ignore[dict-item]
        generator = torch.Generator().manual_seed(5)
        counts_DV = torch.randint(1, 9, (len(DOMAINS), VOCAB_SIZE), generator=generator, device="cpu")

        def setting(layer: int) -> RouterSetting:
            return RouterSetting(
                config.moe.num_routed_experts,
                config.moe.choices,
                config.hidden_size,
                layer,
                seed,
                DOMAINS,
                (1 / 3, 1 / 3, 1 / 3),
                counts_DV,
            )

        routing_config = RoutingConfig.model_validate(routing or {"router": {"name": "top_k"}})
        return LanguageModel(
            config,
            routing_config,
            setting,
            VOCAB_SIZE,
            32,
            seed,
            expert_parallel_size,
            activation_checkpointing=checkpointing,
            moe_layer=moe_layer,
        )

    return make


@pytest.fixture
def make_batch() -> Callable[..., tuple[RoutingContext, Tensor]]:
    """Context and targets of random tokens, one domain per sequence."""

    def make(num_sequences: int = 3, length: int = 12, seed: int = 7) -> tuple[RoutingContext, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(VOCAB_SIZE, (num_sequences, length + 1), generator=generator)
        sequence_B = torch.arange(num_sequences)
        shape = (num_sequences, length)
        context = RoutingContext(
            token_ids_BL=tokens[:, :-1].contiguous(),
            domain_BL=(sequence_B % len(DOMAINS))[:, None].expand(shape).contiguous(),
            document_BL=sequence_B[:, None].expand(shape).contiguous(),
            position_BL=torch.arange(length).expand(shape).contiguous(),
            sequence_B=sequence_B,
        )
        return context, tokens[:, 1:].contiguous()

    return make
