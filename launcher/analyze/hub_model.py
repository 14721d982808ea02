"""Loads a model of the Hugging Face hub's format and its tokenizer; whatever is wrong with it becomes one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_testbed.launcher.analyze.families import FAMILIES, Family
from moe_testbed.launcher.analyze.request import Dtype
from moe_testbed.launcher.errors import CheckpointError, ConfigError

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class HubModel:
    """A loaded model.

    Attributes:
        name: folder or name on the hub, as given.
        model: the causal language model, in evaluation mode.
        family: what its routers return.
    """

    name: str
    model: Any
    tokenizer: Any
    family: Family


def load_hub_model(name: str, tokenizer: str | None, dtype: Dtype, device: torch.device) -> HubModel:
    """Loads from a folder, which needs no network, or by its name on the hub.

    Args:
        tokenizer: folder or name of another tokenizer than the checkpoint's own.

    Raises:
        CheckpointError: what is there is no MoE model that is supported, is not whole, or does not fit into memory.
        ConfigError: transformers is not installed.
    """
    transformers = import_transformers()
    local = Path(name).is_dir()
    with _told(f"{name} cannot be read", "check the path, or the name and the network"):
        settings, _ = transformers.PretrainedConfig.get_config_dict(name, local_files_only=local)
    model_type = str(settings.get("model_type"))
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{name} is a model of the type '{model_type}', which is dense or not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"transformers {transformers.__version__} does not know the model type '{model_type}' of {name}; "
            "pip install --upgrade transformers"
        )
    source = tokenizer or name
    with _told(f"{source} has no tokenizer that can be loaded", "give another one with --tokenizer"):
        loaded_tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    with _told(f"{name} cannot be loaded", "download it again"):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=local,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} is not whole: {len(missing)} weights are missing, such as {missing[0]}; download it again"
        )
    if len(loaded_tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise CheckpointError(
            f"the tokenizer {source} has {len(loaded_tokenizer):,} pieces, the model only {rows:,} embeddings; "
            "give its own one with --tokenizer"
        )
    with _told(f"{name} does not fit on {device}", "try --dtype bfloat16 or --device cpu"):
        return HubModel(name, model.eval().to(device), loaded_tokenizer, FAMILIES[model_type])


def import_transformers() -> Any:
    """Imports it without its progress bars and notes. Raises ConfigError if it is not there."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "checkpoints of the hub's format need transformers, which is not installed; "
            "pip install 'moe-testbed[checkpoints]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers and safetensors raise dozens of types for files that are not as expected
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise CheckpointError(f"{what} ({lines[0][:300]}): {remedy}") from error
