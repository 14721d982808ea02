"""Tiny models of every family with random weights, models whose routing is known, and a tokenizer of characters."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_testbed.data.documents import Document

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

ALPHABETS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "digits": "01234567", "hebrew": "אבגדהוזח"}
SPECIAL = ("<pad>", "<s>", "</s>")
CHARACTERS = "".join(ALPHABETS.values())
VOCAB_SIZE = len(SPECIAL) + len(CHARACTERS)
EXPERTS, WIDTH = 8, 32

_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
_NARROW = {"moe_intermediate_size": 16}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_DEEPSEEK = _NARROW | _LATENT | {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1}
_GROUPS = {"n_group": 4, "topk_group": 2}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
    "olmoe": ("olmoe", {"num_experts": EXPERTS}),
    "qwen2_moe": ("qwen2_moe", _NARROW | {"num_experts": EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", _NARROW | {"num_experts": EXPERTS, "head_dim": 8, "norm_topk_prob": True}),
    "deepseek_v2": ("deepseek_v2", _DEEPSEEK | {"topk_method": "greedy"}),
    "deepseek_v2_groups": ("deepseek_v2", _DEEPSEEK | _GROUPS | {"topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK | _GROUPS | {"routed_scaling_factor": 2.5}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": EXPERTS, "head_dim": 8}),
}


def make_tokenizer(adds_bos: bool = True) -> Any:
    """A character is a token, in the order of ``CHARACTERS`` after the special ones."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    if adds_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(name: str, **options: Any) -> Any:
    """A model with random weights, and with router weights so large that choices are clear."""
    model_type, own = CONFIGS[name]
    config = transformers.CONFIG_MAPPING[model_type](**{**_SHARED, **own, **options})
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for part, tensor in (*model.named_parameters(), *model.named_buffers()):
            if part.endswith(("mlp.gate.weight", "mlp.router.weight", "mlp.router.bias", "e_score_correction_bias")):
                tensor.normal_()
    return model


@torch.no_grad()
def make_routed_model(embedding_VM: torch.Tensor, router_EM: torch.Tensor, top_k: int) -> Any:
    """A Mixtral in which a token's router sees its embedding in every layer: attention and experts add nothing."""
    model = make_model("mixtral", num_experts_per_tok=top_k)
    model.model.embed_tokens.weight.copy_(embedding_VM)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.experts.down_proj.zero_()
        layer.mlp.gate.weight.copy_(router_EM)
    return model


def save(model: Any, folder: Path, tokenizer: Any = None) -> Path:
    """Writes a checkpoint in the hub's format."""
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return folder


def make_documents(
    per_domain: int, characters: int, alphabets: Mapping[str, str] = ALPHABETS
) -> dict[str, list[Document]]:
    """Random text, every domain over its own alphabet; documents of 1 to 2 times as many characters."""
    generator = random.Random(1)
    return {
        name: [
            Document("".join(generator.choices(alphabet, k=generator.randint(characters, 2 * characters))), f"{number}")
            for number in range(per_domain)
        ]
        for name, alphabet in alphabets.items()
    }
