"""The model part of an experiment's config, and what follows from it."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, Field, model_validator

# Grouped matrix products take rows of whole 16 bytes: eight numbers in bfloat16.
ALIGNMENT = 8


class MoEConfig(BaseModel, extra="forbid", frozen=True):
    """The mixture-of-experts layers.

    The fields are what an experiment says; what routers, balancers and layers are built from are the properties, in
    which ``split`` and the zero-computation experts are accounted for.
    """

    num_experts: int = Field(gt=0, description="routed experts with a feed-forward layer, before split")
    top_k: int = Field(gt=0, description="experts per token, before split")
    expert_hidden_size: int = Field(
        gt=0,
        multiple_of=ALIGNMENT,
        description=f"width of each expert's feed-forward layer before split, a multiple of {ALIGNMENT}",
    )
    split: int = Field(
        1,
        gt=0,
        description="m: every expert becomes m experts of 1/m of its width, and a token uses m times as many "
        "(DeepSeekMoE, arXiv 2401.06066, section 3.1); parameters and FLOPs stay the same",
    )
    num_zero_experts: int = Field(0, ge=0, description="routed experts that return 0 (MoE++, arXiv 2410.07348)")
    num_copy_experts: int = Field(0, ge=0, description="routed experts that return their input (MoE++)")
    num_constant_experts: int = Field(
        0, ge=0, description="routed experts that mix their input with a learned vector (MoE++)"
    )
    every: int = Field(1, gt=0, description="every n-th layer is an MoE layer: the layers n, 2n, ... counted from 1")
    num_shared_experts: int = Field(0, ge=0, description="experts that every token uses, outside the routing")
    dispatch: Literal["dropless", "capacity"] = Field(
        "dropless",
        description="dropless: sorted tokens, grouped matrix products; capacity: fixed buffers, drops what overflows",
    )
    capacity_factor: float = Field(1.25, gt=0, description="capacity dispatch: slots per expert = factor * K * T / E")

    @property
    def num_ffn_experts(self) -> int:
        """How many routed experts have a feed-forward layer, after the split; the ones that ranks share out."""
        return self.num_experts * self.split

    @property
    def num_zero_computation_experts(self) -> int:
        """How many routed experts have no feed-forward layer."""
        return self.num_zero_experts + self.num_copy_experts + self.num_constant_experts

    @property
    def num_routed_experts(self) -> int:
        """E: what a router chooses from, first the experts with a feed-forward layer, then zero, copy and constant
        ones."""
        return self.num_ffn_experts + self.num_zero_computation_experts

    @property
    def choices(self) -> int:
        """How many experts a token chooses after the split (K)."""
        return self.top_k * self.split

    @property
    def expert_size(self) -> int:
        """How wide each expert's feed-forward layer is, after the split."""
        return self.expert_hidden_size // self.split

    def expert_capacity(self, tokens: int) -> int:
        """Returns each expert's slots for so many tokens under capacity: ``ceil(capacity_factor * K * T / E)``.

        K is the configured one, also where tokens choose more experts or fewer, and E includes the zero-computation
        experts: factor 1 is the load of each expert when all of them are used alike, whatever they compute.
        """
        return max(1, math.ceil(self.capacity_factor * self.choices * tokens / self.num_routed_experts))

    @model_validator(mode="after")
    def _enough_experts(self) -> MoEConfig:
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.moe.top_k is {self.top_k} but model.moe.num_experts is only {self.num_experts}; a token can "
                f"use each expert once"
            )
        return self

    @model_validator(mode="after")
    def _split_is_aligned(self) -> MoEConfig:
        if self.expert_hidden_size % (self.split * ALIGNMENT):
            raise ValueError(
                f"model.moe.split is {self.split}, which does not divide model.moe.expert_hidden_size = "
                f"{self.expert_hidden_size} into multiples of {ALIGNMENT}; make that a multiple of "
                f"{self.split * ALIGNMENT}"
            )
        return self


ENCODER, DECODER = "encoder", "decoder"
STACKS = {"causal": (DECODER,), "encoder": (ENCODER,), "encoder_decoder": (ENCODER, DECODER)}
"""Architecture -> names of its stacks, from the input to the output."""


class StackConfig(BaseModel, extra="forbid", frozen=True):
    """What one stack of an encoder or an encoder-decoder model has of its own; null: as the model says."""

    num_layers: int | None = Field(None, gt=0)
    num_heads: int | None = Field(None, gt=0)
    dense_hidden_size: int | None = Field(None, gt=0)
    dense_baseline: bool | None = Field(None, description="true: no layer of this stack has experts")


class ModelConfig(BaseModel, extra="forbid", frozen=True):
    """A language model: of one stack of layers, or of an encoder and a decoder."""

    architecture: Literal["causal", "encoder", "encoder_decoder"] = Field(
        "causal",
        description="causal: a decoder alone; encoder: every token sees all others; encoder_decoder: a decoder that "
        "also sees what an encoder makes of another text",
    )
    encoder: StackConfig = Field(StackConfig(), description="what the encoder has of its own")
    decoder: StackConfig = Field(StackConfig(), description="what the decoder of an encoder_decoder has of its own")
    embeddings: Literal["shared", "equal_start", "separate"] = Field(
        "shared",
        description="shared: one table is read by all stacks and is the output layer; equal_start: one table each, all "
        "from the same start; separate: each from a start of its own",
    )
    num_layers: int = Field(gt=0, description="layers of each stack")
    hidden_size: int = Field(gt=0, multiple_of=ALIGNMENT, description=f"model width (M), a multiple of {ALIGNMENT}")
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

    @model_validator(mode="after")
    def _stacks_fit(self) -> ModelConfig:
        for name in (ENCODER, DECODER):
            own = getattr(self, name)
            if own != StackConfig() and (name not in STACKS[self.architecture] or self.architecture == "causal"):
                raise ValueError(
                    f"model.{name} is given, but model.architecture is {self.architecture}, which has no such part; "
                    "leave it out, or choose another architecture"
                )
        if self.architecture == "causal":
            if self.embeddings != "shared":
                raise ValueError(
                    f"model.embeddings is {self.embeddings}, but a causal model has one table; set it to shared, or "
                    "choose another model.architecture"
                )
            return self
        for name in STACKS[self.architecture]:
            self.of_stack(name)
        return self

    @property
    def stacks(self) -> tuple[str, ...]:
        """Names of the stacks, from the input to the output."""
        return STACKS[self.architecture]

    def of_stack(self, name: str) -> ModelConfig:
        """Returns the config of one stack, in the form of a model that has this one alone. Raises ValueError if what
        the stack has of its own does not fit."""
        if self.architecture == "causal":
            return self
        own = getattr(self, name).model_dump(exclude_none=True)
        whole = {key: getattr(self, key) for key in type(self).model_fields}
        alone = {"architecture": "causal", "encoder": StackConfig(), "decoder": StackConfig(), "embeddings": "shared"}
        return ModelConfig.model_validate({**whole, **alone, **own})

    @property
    def active_hidden_size(self) -> int:
        """Feed-forward width that a token passes in an MoE layer, if none of its choices is a zero-computation
        expert."""
        return (self.moe.choices + self.moe.num_shared_experts) * self.moe.expert_size

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
    def stack_of_layer(self) -> tuple[str, ...]:
        """Name of the stack of each MoE layer, in the order in which the layers of all stacks are numbered."""
        return tuple(name for name in self.stacks for _ in range(self.of_stack(name).num_moe_layers))

    @property
    def num_moe_layers(self) -> int:
        """How many layers of all stacks are MoE layers (Y)."""
        if self.architecture != "causal":
            return sum(self.of_stack(name).num_moe_layers for name in self.stacks)
        return sum(self.is_moe_layer(layer) for layer in range(self.num_layers))
