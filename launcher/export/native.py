"""Our models as transformers' own: EuroBert, Llama and Mixtral, weight by weight.

Shape legend: M model width, V token ids, E experts, F feed-forward width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT
from moe_testbed.launcher.export.conditions import EUROBERT, LLAMA, MIXTRAL
from moe_testbed.launcher.export.own import joined_experts
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


def state_of(model: LanguageModel, form: str) -> dict[str, Tensor]:
    """Returns the weights under the names that a model of transformers has in memory."""
    ours = joined_experts(model.state_dict())
    prefix = "encoder." if form == EUROBERT else ""
    state = {_TABLE: ours["embedding.weight"], "model.norm.weight": ours[f"{prefix}final_norm.weight"]}
    state[_OUTPUT] = ours.get("output_embedding.weight", ours["embedding.weight"])
    for layer in range(model.config.num_layers):
        block, theirs = f"{prefix}blocks.{layer}.", f"model.layers.{layer}."
        state |= {theirs + name: ours[block + own] for own, name in _BLOCK.items() if block + own in ours}
        state |= {
            theirs + name: part for name, part in zip(_PROJECTIONS, ours[block + _PROJECTED].chunk(3), strict=True)
        }
        if form == MIXTRAL:
            for weight, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                # They multiply from the other side.
                state[f"{theirs}mlp.experts.{name}"] = ours[f"{block}moe.{weight}"].transpose(1, 2)
    return state | (_biases(model, state) if form == EUROBERT else {})


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


def own_state(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of an EuroBert that `state_of` has made, under the names that our encoders have."""
    names = {name: own for own, name in _BLOCK.items()}
    state = {"embedding.weight": theirs[_TABLE], "encoder.final_norm.weight": theirs["model.norm.weight"]}
    if _OUTPUT in theirs:
        state["output_embedding.weight"] = theirs[_OUTPUT]
    for key, tensor in theirs.items():
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", key)
        if found and found[2] in names:
            state[f"encoder.blocks.{found[1]}.{names[found[2]]}"] = tensor
        elif found and found[2] == _PROJECTIONS[0]:
            parts = [theirs[f"model.layers.{found[1]}.{name}"] for name in _PROJECTIONS]
            state[f"encoder.blocks.{found[1]}.{_PROJECTED}"] = torch.cat(parts)
    return state
