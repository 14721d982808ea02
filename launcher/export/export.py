"""Exports a run: its model in the hub's format, with tokenizer and model card, checked before it gets its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT
from moe_testbed.launcher.checkpoint.own_run import load_model, open_run
from moe_testbed.launcher.config.model_size import size_of, special_ids
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.export import native, own
from moe_testbed.launcher.export.card import auto_class, model_card
from moe_testbed.launcher.export.check import refuse_other_tokens, refuse_unlike
from moe_testbed.launcher.export.conditions import OWN, form_of, refusal
from moe_testbed.launcher.export.folder import new_folder, record_file, record_of, refuse_occupied
from moe_testbed.launcher.export.library import import_transformers
from moe_testbed.launcher.export.source import write_rest
from moe_testbed.launcher.export.tokenizer import make_tokenizer
from moe_testbed.model.config import DECODER, ENCODER
from moe_testbed.model.language_model import LanguageModel


def export(
    folder: Path, out: Path, cache_dir: Path | None, log: Any, overwrite: bool = False, trust: bool = False
) -> str:
    """Writes the newest whole checkpoint of a run as a folder that transformers loads.

    Args:
        cache_dir: where the token store is; None: where the training had it.
        overwrite: an earlier export in ``out`` is replaced.
        trust: a router that the config of another user's run names may be imported.

    Returns:
        The name of the model's class in transformers.

    Raises:
        CheckpointError: no whole checkpoint, data that have changed since the training, or an export that would load
            wrong, of which nothing is left.
        ConfigError: the model cannot be exported, ``out`` must stay as it is, or transformers is not installed.
    """
    refuse_occupied(out, overwrite)
    transformers = import_transformers("exports")
    run = open_run(folder, cache_dir, log, trust)
    if reason := refusal(run.config):
        raise ConfigError(f"{folder} cannot be exported: {reason}")
    model, ids = load_model(run), special_ids(run.config, run.store.vocab_size)
    form, lengths = form_of(model), run.config.objective.lengths(run.config.data.sequence_length)
    with new_folder(out, overwrite) as filling:
        class_name = _write_model(transformers, filling, model, form, ids, lengths)
        tokenizer = make_tokenizer(run.store.tokenizer_path, model.config.architecture, ids, max(lengths.values()))
        tokenizer.save_pretrained(filling)
        size = size_of(model, run.config.data.sequence_length, run.config.objective)
        (filling / "README.md").write_text(model_card(run, size, class_name, form == OWN), encoding="utf-8")
        if ENCODER in model.config.stacks:
            write_rest(filling, model, form)
        record = json.dumps(record_of(run, filling), indent=1, ensure_ascii=False)
        record_file(filling).write_text(record, encoding="utf-8")
        refuse_other_tokens(filling, run.store, form == OWN)
        refuse_unlike(filling, model, ids, lengths, form == OWN)
    return class_name


def _write_model(
    transformers: Any, folder: Path, model: LanguageModel, form: str, ids: SpecialIds, lengths: dict[str, int]
) -> str:
    """Writes config, weights and what `generate` needs; returns the name of the class."""
    length, auto = max(lengths.values()), auto_class(model.config.architecture)
    if form == OWN:
        theirs = _own_model(folder, model, ids, length)
    else:
        config = transformers.CONFIG_MAPPING[form](**native.config_of(model, form, ids, length))
        theirs = getattr(transformers, auto).from_config(config, dtype=torch.float32)
        theirs.load_state_dict(native.state_of(model, form))
    if DECODER in model.config.stacks:
        theirs.generation_config = transformers.GenerationConfig(
            max_length=lengths[DECODER],
            do_sample=False,
            pad_token_id=0,
            bos_token_id=END_OF_DOCUMENT,
            eos_token_id=END_OF_DOCUMENT,
            **({"use_cache": False} if form == OWN else {}),
            **({"decoder_start_token_id": ids.start} if len(lengths) > 1 else {}),
        )
    theirs.save_pretrained(folder)
    return type(theirs).__name__


def _own_model(folder: Path, model: LanguageModel, ids: SpecialIds, length: int) -> Any:
    """Returns the model as one of our own classes, and writes their file into the folder."""
    # It imports transformers, which not everybody has.
    from moe_testbed.launcher.export import modeling_moe_testbed as classes

    architecture = model.config.architecture
    name = {"encoder": "MaskedLM", "causal": "CausalLM", "encoder_decoder": "ConditionalGeneration"}[architecture]
    model_class = getattr(classes, f"MoeTestbedFor{name}")
    module = classes.__name__.rpartition(".")[2]
    config = classes.MoeTestbedConfig(**own.config_of(model, ids, length))
    config.auto_map = {
        "AutoConfig": f"{module}.{classes.MoeTestbedConfig.__name__}",
        auto_class(architecture): f"{module}.{model_class.__name__}",
    }
    theirs = model_class(config)
    theirs.load_state_dict(own.state_of(model))
    shutil.copyfile(Path(str(classes.__file__)), folder / f"{module}.py")
    return theirs
