"""The model part of an experiment's config, and what follows from it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

# Grouped matrix products take rows of whole 16 bytes: eight numbers in bfloat16.
ALIGNMENT = 8


class MoEConfig(BaseModel, extra="forbid", frozen=True):
    """The mixture-of-experts layers."""

    num_experts: int = Field(gt=0, description="routed experts of each MoE layer (E)")
    top_k: int = Field(gt=0, description="experts per token (K)")
    expert_hidden_size: int = Field(
        gt=0, multiple_of=ALIGNMENT, description=f"width of each expert's feed-forward layer, a multiple of {ALIGNMENT}"
    )
    every: int = Field(1, gt=0, description="every n-th layer is an MoE layer: the layers n, 2n, ... counted from 1")
    num_shared_experts: int = Field(0, ge=0, description="experts that every token uses, outside the routing")
    dispatch: Literal["dropless", "capacity"] = Field(
        "dropless",
        description="dropless: sorted tokens, grouped matrix products; capacity: fixed buffers, drops what overflows",
    )
    capacity_factor: float = Field(1.25, gt=0, description="capacity dispatch: slots per expert = factor * K * T / E")

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k is {self.top_k} but model.moe.num_experts is only {self.num_experts}; a token can "
                f"use each expert once"
            )
        return self


class ModelConfig(BaseModel, extra="forbid", frozen=True):
    """A decoder-only language model."""

    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0, multiple_of=ALIGNMENT, description=f"model width (D), a multiple of {ALIGNMENT}")
    num_heads: int = Field(gt=0)
    dense_hidden_size: int | None = Field(
        None,
        gt=0,
        description="width of the dense feed-forward layers; default: as many parameters as an MoE layer has active",
    )
    dense_baseline: bool = Field(
        False, description="replace every MoE layer by a dense layer of equal active parameters"
    )
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary position frequencies")
    norm_epsilon: float = Field(1e-6, gt=0)
    moe: MoEConfig

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelConfig:
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"model.hidden_size is {self.hidden_size}, which is no multiple of 2 * model.num_heads = "
                f"{2 * self.num_heads}; "
                "rotary positions need an even width per head"
            )
        if self.num_layers < self.moe.every:
            raise ValueError(
                f"model.moe.every is {self.moe.every} but model.num_layers is {self.num_layers}: no layer would be an "
                f"MoE layer; "
                "lower model.moe.every, or set model.dense_baseline for a dense model"
            )
        return self

    @property
    def active_hidden_size(self) -> int:
        """Feed-forward width that a token passes in an MoE layer."""
        return (self.moe.top_k + self.moe.num_shared_experts) * self.moe.expert_hidden_size

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (from 0) is an MoE layer."""
        return not self.dense_baseline and self._has_moe_place(layer)

    def dense_size(self, layer: int) -> int:
        """Feed-forward width of layer ``layer`` if it is dense: in the dense baseline as much as an MoE layer there has
        active."""
        if self._has_moe_place(layer):
            return self.active_hidden_size
        return self.dense_hidden_size or self.active_hidden_size

    def _has_moe_place(self, layer: int) -> bool:
        return (layer + 1) % self.moe.every == 0

    @property
    def num_moe_layers(self) -> int:
        """Y."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))


class ModelSize(BaseModel, frozen=True):
    """Parameters and arithmetic of a model.

    Attributes:
        parameters: all of them.
        active_parameters: those that one token uses.
        flops_per_token: floating point operations of forward and backward for one token: six per active parameter that
            takes part in a matrix product (the embedding counts once, as the output projection) and ``12 * L / 2 * D``
            per layer for causal attention over L positions.
    """

    parameters: int
    active_parameters: int
    flops_per_token: int


def model_size(
    config: ModelConfig, vocab_size: int, sequence_length: int, routers_have_weights: bool = True
) -> ModelSize:
    """Counts without building the model."""
    width, moe = config.hidden_size, config.moe
    embedding = vocab_size * width
    attention = 4 * width * width
    norms = (2 * config.num_layers + 1) * width
    expert = 3 * width * moe.expert_hidden_size
    router = width * moe.num_experts if routers_have_weights else 0
    total, active = embedding + norms, embedding + norms
    for layer in range(config.num_layers):
        if config.is_moe_layer(layer):
            total += attention + router + (moe.num_experts + moe.num_shared_experts) * expert
            active += attention + router + (moe.top_k + moe.num_shared_experts) * expert
        else:
            dense = 3 * width * config.dense_size(layer)
            total += attention + dense
            active += attention + dense
    flops = 6 * (active - norms) + config.num_layers * 6 * sequence_length * width
    return ModelSize(parameters=total, active_parameters=active, flops_per_token=flops)
