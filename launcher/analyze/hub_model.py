"""Loads a model of the Hugging Face hub's format and its tokenizer; whatever is wrong with it becomes one line."""

from __future__ import annotations

import logging
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moe_testbed.launcher.analyze.families import FAMILIES, Family
from moe_testbed.launcher.analyze.hub_config import refuse_unroutable
from moe_testbed.launcher.analyze.hub_quantised import cut_blocks, dequantise, method_of, refuse_experts, remedy
from moe_testbed.launcher.analyze.request import Dtype, log
from moe_testbed.launcher.analyze.weights import names_in, refuse_damaged_files, refuse_not_finite, refuse_unfitting
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.export import library

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = ("tokenizer.*", "*.tiktoken", "*.model", "vocab.*", "spiece.*")
_REASON_CHARACTERS = 500

# In the report of a loading: the error, and the weight that it met.
_CONVERSION = re.compile(r"^(.+)\nError\b.*?(?:destined for|parameter) (\S+?)\.?(?:\s|$)", re.MULTILINE)


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
    config = _config(transformers, name, settings, local)
    source = tokenizer or name
    loaded_tokenizer = _tokenizer(transformers, source)
    model = _model(transformers, name, config, method_of(settings), dtype, local)
    if len(loaded_tokenizer) > (rows := model.get_input_embeddings().weight.shape[0]):
        raise CheckpointError(
            f"the tokenizer {source} has {len(loaded_tokenizer):,} pieces, the model only {rows:,} embeddings; "
            "give its own one with --tokenizer"
        )
    family = FAMILIES[config.model_type]
    with _told(f"{name} does not fit on {device}", "try --dtype bfloat16 or --device cpu"):
        model = model.eval().to(device)
    refuse_not_finite(
        name,
        (*model.named_parameters(), *model.named_buffers()),
        family.router,
        "take another copy, or repeat the conversion that made this one",
    )
    return HubModel(name, model, loaded_tokenizer, family)


def _config(transformers: Any, name: str, settings: dict[str, Any], local: bool) -> Any:
    """Returns transformers' config of a model whose routers can route. Raises CheckpointError."""
    model_type = settings.get("model_type")
    if model_type is None:
        raise CheckpointError(f"{name}: its config.json has no model_type; take the one that was published")
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
    with _told(f"{name}: its config.json cannot be right", "take the one that was published"):
        config = transformers.AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    refuse_unroutable(name, config)
    # It may name kernels on the hub, which are code.
    config._attn_implementation = None
    return config


def _tokenizer(transformers: Any, source: str) -> Any:
    """Returns the tokenizer of a folder or of a name on the hub. Raises CheckpointError."""
    local = Path(source).is_dir()
    if local and not any(any(Path(source).glob(pattern)) for pattern in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{source} has no tokenizer that can be loaded (no tokenizer.json, tokenizer.model or vocabulary): "
            "give another one with --tokenizer"
        )
    with _told(f"{source} has no tokenizer that can be loaded", "give another one with --tokenizer"):
        return transformers.AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)


def _model(transformers: Any, name: str, config: Any, method: str | None, dtype: Dtype, local: bool) -> Any:
    """Returns the model on the CPU, in plain weights where transformers can make them of quantised ones.

    Args:
        method: how its weights are quantised; None: they are not.

    Raises:
        CheckpointError: the weights are not whole, not those of the config, or cannot be read.
    """
    if local:
        refuse_damaged_files(Path(name))
    what: str = f"{name} cannot be loaded"
    helps: str | Callable[[Exception], str] = "download it again"
    if method is not None:
        what, helps = f"{name}, whose weights are quantised by {method}, cannot be loaded", partial(remedy, method)
        if local:
            refuse_experts(name, method, names_in(Path(name)))
        dequantise(config, method)
    with _told(what, helps), cut_blocks(config):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            local_files_only=local,
            trust_remote_code=False,
            # They are told with their sizes, which the error of transformers leaves to a report.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    refuse_unfitting(name, info)
    if method is not None:
        log(f"{name}: weights quantised by {method} are read as {str(model.dtype).removeprefix('torch.')}")
    return model


def import_transformers() -> Any:
    """Imports it without its progress bars and notes. Raises ConfigError if it is not there."""
    return library.import_transformers("checkpoints of the hub's format")


@contextmanager
def _told(what: str, remedy: str | Callable[[Exception], str]) -> Iterator[None]:
    """Makes one line of whatever is raised inside; the remedy may depend on it."""
    with _report() as report:
        try:
            yield
        except Exception as error:  # transformers and safetensors raise dozens of types for files not as expected
            helps = remedy if isinstance(remedy, str) else remedy(error)
            raise CheckpointError(f"{what} ({_reason(error, report)}): {helps}") from error


def _reason(error: Exception, report: list[str]) -> str:
    """Returns the whole reason, of which transformers tells some in several lines and some in a report that it logs."""
    text = str(error)
    if "trust_remote_code" in text:
        text = "it would need code of its own, and no code of a checkpoint is run"
    elif "above report" in text and (found := _CONVERSION.search("\n".join(report))):
        text = f"{found[1]} ({found[2]})"
    return textwrap.shorten(text, _REASON_CHARACTERS, placeholder=" ...") or type(error).__name__


@contextmanager
def _report() -> Iterator[list[str]]:
    """Collects what transformers would log of a loading, and logs none of it."""
    texts: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    logger, collector = logging.getLogger("transformers.modeling_utils"), Collector()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(collector)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield texts
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
        logger.propagate = propagate
