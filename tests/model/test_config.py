"""Sizes that a config promises against the parameters of the model that is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from moe_testbed.launcher.config.model_size import size_of
from moe_testbed.model.config import ModelConfig, MoEConfig
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.moe import MoELayer
from tests.model.closed_forms import model_size

V, L = 37, 24

CONFIGS: list[dict[str, Any]] = [
    {},
    {"num_layers": 5, "moe": {"every": 2}},
    {"num_layers": 3, "dense_hidden_size": 40, "moe": {"every": 3, "num_shared_experts": 2}},
    {"moe": {"top_k": 1, "num_shared_experts": 1, "expert_hidden_size": 16}},
    {"moe": {"split": 2, "expert_hidden_size": 32, "num_shared_experts": 1}},
    {"moe": {"num_zero_experts": 1, "num_copy_experts": 1, "num_constant_experts": 3}},
    {"num_layers": 4, "dense_baseline": True, "dense_hidden_size": 8, "moe": {"every": 2, "num_shared_experts": 1}},
]


def unused_expert_parameters(model: LanguageModel) -> int:
    """Of the experts that a token does not use."""
    moe = model.config.moe
    of_experts = sum(p.numel() for name, p in model.named_parameters() if ".deepspeed_moe.experts." in name)
    return of_experts * (moe.num_experts - moe.top_k) // moe.num_experts


def router_parameters(model: LanguageModel) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".routing." in name)


@pytest.mark.parametrize("options", CONFIGS)
@pytest.mark.parametrize("router", ["top_k", "hash", "frozen"])
def test_size_equals_the_parameters_built(
    options: dict[str, Any], router: str, make_model: Callable[..., LanguageModel]
) -> None:
    model = make_model({"router": {"name": router}}, **options)
    size = size_of(model, L)
    assert asdict(size) == model_size(model.config, V, L, router_parameters(model))
    built = sum(p.numel() for p in model.parameters())
    assert size.parameters == built
    assert size.active_parameters == built - unused_expert_parameters(model)


@pytest.mark.parametrize("options", CONFIGS)
def test_flops_are_six_per_weight_multiplied_and_attention(
    options: dict[str, Any], make_model: Callable[..., LanguageModel]
) -> None:
    model = make_model(**options)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1) - unused_expert_parameters(model)
    # Scores and mixing: two products of width M over half of the L positions, each 2 FLOPs forward and 4 backward.
    attention = model.config.num_layers * 2 * 6 * model.config.hidden_size * L // 2
    assert size_of(model, L).flops_per_token == 6 * matrices + attention


@pytest.mark.parametrize("expert_parallel_size", [1, 4])
@pytest.mark.parametrize("options", CONFIGS)
def test_a_rank_on_the_meta_device_counts_all_experts(
    options: dict[str, Any], expert_parallel_size: int, make_model: Callable[..., LanguageModel]
) -> None:
    with torch.device("meta"):
        rank = make_model(expert_parallel_size=expert_parallel_size, moe_layer=MoELayer, **options)
    assert asdict(size_of(rank, L)) == model_size(rank.config, V, L, router_parameters(rank))


@pytest.mark.parametrize("options", CONFIGS[:-1])
def test_dense_baseline_has_equal_active_parameters(
    options: dict[str, Any], make_model: Callable[..., LanguageModel]
) -> None:
    model, dense = make_model(**options), make_model(**options, dense_baseline=True)
    constants = sum(p.numel() for name, p in model.named_parameters() if ".zero_computation." in name)
    active = sum(p.numel() for p in model.parameters()) - unused_expert_parameters(model)
    assert sum(p.numel() for p in dense.parameters()) == active - router_parameters(model) - constants
    assert not any(".moe." in name or ".routing." in name for name, _ in dense.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 24, "num_heads": 8}, r"model\.hidden_size is 24.*no multiple of 2 \* model\.num_heads = 16"),
        ({"num_layers": 1, "moe": {"every": 2}}, r"model\.moe\.every is 2 but model\.num_layers is 1"),
        ({"moe": {"top_k": 13}}, r"model\.moe\.top_k is 13 but model\.moe\.num_experts is only 12"),
        ({"moe": {"expert_hidden_size": 12}}, "multiple of 8"),
        (
            {"moe": {"split": 2}},
            r"model\.moe\.split is 2, which does not divide model\.moe\.expert_hidden_size = 8 into multiples of 8; "
            r"make that a multiple of 16",
        ),
        ({"hidden_size": 12}, "multiple of 8"),
    ],
)
def test_impossible_sizes_are_refused(
    options: dict[str, Any], message: str, make_model: Callable[..., LanguageModel]
) -> None:
    with pytest.raises(ValidationError, match=message):
        make_model(**options)


def test_layers_are_counted_from_one() -> None:
    config = ModelConfig.model_validate(
        {
            "num_layers": 6,
            "hidden_size": 16,
            "num_heads": 2,
            "moe": {"num_experts": 4, "top_k": 1, "expert_hidden_size": 8, "every": 3},
        }
    )
    assert [config.is_moe_layer(layer) for layer in range(6)] == [False, False, True, False, False, True]
    assert config.num_moe_layers == 2


def test_split_keeps_the_width_that_a_token_passes() -> None:
    moe = {"num_experts": 4, "top_k": 2, "expert_hidden_size": 32, "num_shared_experts": 1}
    whole, split = MoEConfig.model_validate(moe), MoEConfig.model_validate(moe | {"split": 4, "num_zero_experts": 3})
    assert (split.num_ffn_experts, split.num_routed_experts, split.choices, split.expert_size) == (16, 19, 8, 8)
    assert split.num_ffn_experts * split.expert_size == whole.num_ffn_experts * whole.expert_size
    assert split.choices * split.expert_size == whole.choices * whole.expert_size
