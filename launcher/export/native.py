"""Our models as transformers' own: EuroBert, Llama and Mixtral, weight by weight.

Shape legend: M model width, V token ids, E experts, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT
from moe_testbed.launcher.export.conditions import EUROBERT, LLAMA, MIXTRAL
from moe_testbed.launcher.export.own import joined_experts, split_experts
from moe_testbed.model.config import ModelConfig
from moe_testbed.model.language_model import LanguageModel

NO_TARGET_LOGIT = -1e4
"""Logit of ids that no text has: so low that their probability is 0, in half precision too."""

_TABLE, _OUTPUT, _BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "feed_forward_norm.weight": "post_attention_layernorm.weight",
    "dense.gate.weight": "mlp.gate_proj.weight",
    "dense.up.weight": "mlp.up_proj.weight",
    "dense.down.weight": "mlp.down_proj.weight",
    "routing.router.scorer.weight": "mlp.gate.weight",
}
_PROJECTED = "attention.query_key_value.weight"
_PROJECTIONS = [f"self_attn.{name}_proj.weight" for name in "qkv"]
_EXPERTS = {"moe.gate_up": "mlp.experts.gate_up_proj", "moe.down": "mlp.experts.down_proj"}
_MLP_BIASES = "mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"


def config_of(model: LanguageModel, form: str, ids: SpecialIds, length: int) -> dict[str, Any]:
    """Returns what transformers' config of this form is made of.

    Args:
        ids: the special ids; a causal model has none.
        length: tokens of the longest text.
    """
    config = model.config
    sizes = {
        "vocab_size": model.embedding.num_embeddings,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_heads,
        "head_dim": config.hidden_size // config.num_heads,
        "intermediate_size": config.moe.expert_size if form == MIXTRAL else _dense_size(model),
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": length,
        "tie_word_embeddings": config.embeddings == "shared",
        "pad_token_id": 0,
        "bos_token_id": END_OF_DOCUMENT,
        "eos_token_id": END_OF_DOCUMENT,
        "attention_dropout": 0.0,
    }
    if form == EUROBERT:
        # Its output layer has a bias if its feed-forward layers have: with it, no probability goes to special ids.
        return {**sizes, "mask_token_id": ids.mask, "attention_bias": False, "mlp_bias": True}
    if form == LLAMA:
        return {**sizes, "attention_bias": False, "mlp_bias": False}
    experts = {"num_local_experts": config.moe.num_routed_experts, "num_experts_per_tok": config.moe.choices}
    return {**sizes, **experts, "sliding_window": None, "router_jitter_noise": 0.0}


def _dense_size(model: LanguageModel) -> int:
    (stack,) = model.stacks.values()
    sizes = {stack.config.dense_size(layer) for layer in range(stack.config.num_layers)}
    assert len(sizes) == 1, "form_of leaves stacks of several widths to our own class"
    return sizes.pop()


@dataclass(frozen=True)
class _Pair:
    """One of our weights.

    Attributes:
        theirs: what it is called there; several names if it is cut into as many equal pieces.
        is_transposed: it multiplies from the other side.
    """

    own: str
    theirs: tuple[str, ...]
    is_transposed: bool = False

    def pieces(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Returns our weight as theirs."""
        return (weight.transpose(1, 2) if self.is_transposed else weight).chunk(len(self.theirs))

    def joined(self, pieces: Sequence[Tensor]) -> Tensor:
        """Returns their weights as ours."""
        weight = torch.cat(list(pieces)) if len(pieces) > 1 else pieces[0]
        return weight.transpose(1, 2) if self.is_transposed else weight


def _pairs(config: ModelConfig, form: str) -> Iterator[_Pair]:
    """Yields all weights that a model of this form can have."""
    prefix = "encoder." if form == EUROBERT else ""
    yield _Pair("embedding.weight", (_TABLE,))
    yield _Pair(f"{prefix}final_norm.weight", ("model.norm.weight",))
    if config.embeddings != "shared":
        yield _Pair("output_embedding.weight", (_OUTPUT,))
    for layer in range(config.num_layers):
        block, theirs = f"{prefix}blocks.{layer}.", f"model.layers.{layer}."
        yield _Pair(block + _PROJECTED, tuple(theirs + name for name in _PROJECTIONS))
        for own, name in _BLOCK.items():
            yield _Pair(block + own, (theirs + name,))
        for own, name in _EXPERTS.items():
            yield _Pair(block + own, (theirs + name,), is_transposed=True)


def state_of(model: LanguageModel, form: str) -> dict[str, Tensor]:
    """Returns the weights under the names that a model of transformers has in memory."""
    ours = joined_experts(model.state_dict())
    state: dict[str, Tensor] = {}
    for pair in _pairs(model.config, form):
        if pair.own in ours:
            state |= dict(zip(pair.theirs, pair.pieces(ours[pair.own]), strict=True))
    # A shared table is there under both names.
    state.setdefault(_OUTPUT, state[_TABLE])
    return state | (_biases(model, state) if form == EUROBERT else {})


def own_state(theirs: Mapping[str, Tensor], model: LanguageModel, form: str) -> dict[str, Tensor]:
    """Returns the weights that `state_of` has made of a model like this one, under our names."""
    state = {}
    for pair in _pairs(model.config, form):
        if all(name in theirs for name in pair.theirs):
            state[pair.own] = pair.joined([theirs[name] for name in pair.theirs])
    return split_experts(state)


def _biases(model: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the biases that EuroBert has and we have not: 0, but for ids that can be no target."""
    bias_V = torch.zeros(model.embedding.num_embeddings)
    bias_V[model.output_rows :] = NO_TARGET_LOGIT
    biases = {_BIAS: bias_V}
    for layer in range(model.config.num_layers):
        for name in _MLP_BIASES:
            key = f"model.layers.{layer}.{name}"
            biases[key] = torch.zeros(len(state[key.replace("bias", "weight")]))
    return biases
