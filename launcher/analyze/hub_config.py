"""Reads the config of a model of the hub's format, and refuses one whose routers could not route."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_testbed.launcher.errors import CheckpointError

_METHODS = {
    ("deepseek_v2", "topk_method"): ("greedy", "group_limited_greedy"),
    ("deepseek_v2", "scoring_func"): ("softmax",),
    ("deepseek_v3", "topk_method"): ("noaux_tc",),
    ("deepseek_v3", "scoring_func"): ("sigmoid",),
}
"""What transformers' routers of a family compute. They read no other value of these keys, or pass over it."""


def refuse_other_formats(folder: Path) -> None:
    """Raises CheckpointError if a path holds weights that have to be converted first."""
    if (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{folder} holds an adapter of PEFT (adapter_config.json), no whole model; merge it into its base model "
            "(merge_and_unload, save_pretrained) and analyse that"
        )
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; give the folder of the checkpoint, which has a config.json")
    if folder.is_dir() and not (folder / "config.json").is_file() and any(folder.glob("*.gguf")):
        raise CheckpointError(
            f"{folder} holds weights of the format GGUF, which is not read; take the model's own copy, with "
            "config.json and *.safetensors"
        )


def refuse_unroutable(name: str, config: Any) -> None:
    """Raises CheckpointError if the numbers of experts, choices and groups do not go together, or the router chooses by
    another method than transformers computes.

    Args:
        config: transformers' config of a model of one of the supported families.
    """
    for problem in _problems(config):
        raise CheckpointError(f"{name}: its config.json cannot be right, {problem}; take the one that was published")


def _problems(config: Any) -> Iterator[str]:
    experts, expert_key = _num_experts(config)
    choices = config.num_experts_per_tok
    if not _is_whole_number(experts):
        yield f"{expert_key} is {experts}, and must be a whole number of at least 1"
    if not _is_whole_number(choices) or choices > experts:
        yield f"num_experts_per_tok is {choices}, and must be 1 to {experts} ({expert_key})"
    for (model_type, key), allowed in _METHODS.items():
        value = getattr(config, key, None)
        if config.model_type == model_type and value is not None and value not in allowed:
            yield f"{key} is '{value}', and a router of {model_type} has {' or '.join(map(repr, allowed))}"
    if config.model_type == "deepseek_v3" or getattr(config, "topk_method", None) == "group_limited_greedy":
        yield from _problems_of_groups(config, experts, choices, expert_key)


def _problems_of_groups(config: Any, experts: int, choices: int, expert_key: str) -> Iterator[str]:
    groups, chosen = config.n_group, config.topk_group
    if not _is_whole_number(groups) or experts % groups:
        yield f"n_group is {groups}, and must divide {experts} ({expert_key})"
    if not _is_whole_number(chosen) or chosen > groups:
        yield f"topk_group is {chosen}, and must be 1 to {groups} (n_group)"
    if config.model_type == "deepseek_v3" and experts < 2 * groups:
        yield f"n_group is {groups}: a group is chosen by its two best experts, and {experts} make groups of 1"
    if choices > chosen * (experts // groups):
        yield f"num_experts_per_tok is {choices}, more than the {chosen * (experts // groups)} experts of topk_group"


def _num_experts(config: Any) -> tuple[Any, str]:
    for key in ("n_routed_experts", "num_local_experts", "num_experts"):
        if key in config.to_dict():
            return getattr(config, key), key
    raise AssertionError(f"a config of {config.model_type} has a number of experts")


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
