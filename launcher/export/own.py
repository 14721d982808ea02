"""Our models as the classes of `modeling_moe_testbed`, whose weights have nearly the names that ours have.

Shape legend: Y MoE layers, E experts, V token ids, K choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.stack import Stack
from moe_testbed.routing.router import Router
from moe_testbed.routing.routers.hash import Hash
from moe_testbed.routing.routers.sigmoid import Sigmoid
from moe_testbed.routing.routers.top_k import TopK

_EXPERT = re.compile(r"(.*\.moe\.)deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(gate_up|down)")
_STACKED = re.compile(r"(.*\.moe\.)(gate_up|down)")


def joined_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's state with the weights of each layer's experts as one tensor, `moe.gate_up` and
    `moe.down`."""
    joined: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if found := _EXPERT.fullmatch(name):
            experts.setdefault(f"{found[1]}{found[3]}", {})[int(found[2])] = tensor
        else:
            joined[name] = tensor
    return joined | {
        name: torch.stack([numbered[number] for number in range(len(numbered))]) for name, numbered in experts.items()
    }


def split_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undoes `joined_experts`."""
    split = {}
    for name, tensor in state.items():
        if found := _STACKED.fullmatch(name):
            for number, expert in enumerate(tensor):
                split[f"{found[1]}deepspeed_moe.experts.deepspeed_experts.{number}.{found[2]}"] = expert
        else:
            split[name] = tensor
    return split


def config_of(model: LanguageModel, ids: SpecialIds, length: int) -> dict[str, Any]:
    """Returns what a `MoeTestbedConfig` is made of.

    Args:
        ids: the special ids; a causal model has none.
        length: tokens of the longest text of any stack.
    """
    config = model.config
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": END_OF_DOCUMENT, "eos_token_id": END_OF_DOCUMENT}
    if config.architecture == "encoder":
        special["mask_token_id"] = ids.mask
    if config.architecture == "encoder_decoder":
        special["decoder_start_token_id"] = ids.start
    return {
        "vocab_size": model.embedding.num_embeddings,
        "num_targets": model.output_rows,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": max(stack.config.num_layers for stack in model.stacks.values()),
        "norm_epsilon": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": length,
        "separate_embeddings": config.embeddings != "shared",
        "is_encoder_decoder": config.architecture == "encoder_decoder",
        "is_decoder": config.architecture == "causal",
        "stacks": {name: _stack_config(stack) for name, stack in model.stacks.items()},
        **special,
    }


def _stack_config(stack: Stack) -> dict[str, Any]:
    config, moe = stack.config, stack.config.moe
    layers = range(config.num_layers)
    described: dict[str, Any] = {
        "num_heads": config.num_heads,
        # 0: this layer has experts.
        "dense_sizes": [0 if config.is_moe_layer(layer) else config.dense_size(layer) for layer in layers],
    }
    if not stack.routers():
        return described
    return described | {
        "num_experts": moe.num_ffn_experts,
        "expert_size": moe.expert_size,
        "top_k": moe.choices,
        "shared_size": moe.num_shared_experts * moe.expert_size,
        "routers": "first" if len(stack.routers()) < config.num_moe_layers else "all",
        **_router_config(stack.routers()[0]),
    }


def _router_config(router: Router) -> dict[str, Any]:
    if isinstance(router, Hash):
        return {"scores": "table", "normalise": False, "scale": 1.0}
    if isinstance(router, Sigmoid):
        return {"scores": "sigmoid", "normalise": router.normalise, "scale": router.config.route_scale}
    if isinstance(router, TopK):
        return {"scores": "softmax", "normalise": router.normalise, "scale": 1.0}
    return {"scores": "logits", "normalise": True, "scale": 1.0}


def _names(ours: Iterable[str], architecture: str) -> dict[str, str]:
    """Returns what each of our weights is called there, but for those that only training needs."""
    names = {}
    for own in ours:
        if "balancing." in own or "noise_scorer." in own:
            continue
        stack = "decoder." if architecture == "causal" or own.startswith("decoder.") else "encoder."
        name = own if own.startswith((stack, "decoder_embedding.", "output_embedding.")) else stack + own
        names[own] = name.replace("routing.router.scorer.", "router.scorer.")
    return names


def state_of(model: LanguageModel) -> dict[str, Tensor]:
    """Returns the weights under the names that a model of `modeling_moe_testbed` has."""
    ours = joined_experts(model.state_dict())
    state = {name: ours[own] for own, name in _names(ours, model.config.architecture).items()}
    for name, of_stack in model.stacks.items():
        bias_YE = None if of_stack.balancing is None else of_stack.balancing.selection_bias_YE()
        deciding = [number for number, block in enumerate(of_stack.layers) if block.routing is not None]
        for y, (number, router) in enumerate(zip(deciding, of_stack.routers(), strict=True)):
            prefix = f"{name}.blocks.{number}.router."
            if isinstance(router, Hash):
                state[f"{prefix}table"] = router.table_VK
            else:
                of_none = torch.zeros(router.setting.num_experts)
                state[f"{prefix}selection_bias"] = of_none if bias_YE is None else bias_YE[y]
    return state


def own_state(theirs: Mapping[str, Tensor], model: LanguageModel) -> dict[str, Tensor]:
    """Returns the weights that `state_of` has made of a model like this one, under our names. What only training needs
    is not among them."""
    names = _names(joined_experts(model.state_dict()), model.config.architecture)
    return split_experts({own: theirs[name] for own, name in names.items() if name in theirs})
