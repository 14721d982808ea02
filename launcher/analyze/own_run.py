"""Rebuilds the model of one of our runs from its folder, on one process, and evaluates it as its training did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moe_testbed.data.build import store_path
from moe_testbed.data.config import MixConfig
from moe_testbed.data.documents import Document
from moe_testbed.data.loading import tokenise
from moe_testbed.data.splits import SPLITS, VALIDATION
from moe_testbed.data.tokens.store import Region, Store
from moe_testbed.launcher.analyze.weights import refuse_not_finite
from moe_testbed.launcher.checkpoint.own_run import OwnRun
from moe_testbed.launcher.checkpoint.own_run import open_run as open_any_run
from moe_testbed.launcher.checkpoint.weights import model_state
from moe_testbed.launcher.errors import CheckpointError, ConfigError
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import UNLABELLED


def open_run(folder: Path, cache_dir: Path | None, log: Any, trust: bool = False) -> OwnRun:
    """Reads the folder of a run that has experts. Arguments and errors as those of
    :func:`~moe_testbed.launcher.checkpoint.own_run.open_run`; CheckpointError also for a dense baseline."""
    run = open_any_run(folder, cache_dir, log, trust)
    if run.config.model.dense_baseline:
        raise CheckpointError(f"{folder} is a dense baseline: it has no experts to analyse")
    return run


def load_model(run: OwnRun, dtype: torch.dtype | None, ranks: Ranks) -> LanguageModel:
    """Returns the model with the checkpoint's weights and balancer state, in evaluation mode.

    Args:
        dtype: None: as it was trained.

    Raises:
        CheckpointError: the files do not fit the config, or a weight is not finite.
    """
    model = build_model(run.config, run.store, ranks)
    try:
        model.load_state_dict(model_state(run.checkpoint))
    except RuntimeError as error:
        raise CheckpointError(f"{run.checkpoint} does not fit {RunFolder(run.folder).config_file}: {error}") from error
    remedy = "remove it, and the one before is read"
    refuse_not_finite(str(run.checkpoint), model.named_parameters(), "router.scorer", remedy)
    trained_in = torch.bfloat16 if run.config.training.precision == "bfloat16" else torch.float32
    for parameter in model.parameters():
        # Buffers stay as they are: so DeepSpeed trained it.
        parameter.data = parameter.data.to(dtype or trained_in)
    return model.eval()


def is_own_mix(run: OwnRun, mix: MixConfig) -> bool:
    """Tells whether the mix is what the run was trained on, but for the weights of its domains."""
    return store_path(mix, Path()) == store_path(run.config.data.mix, Path())


def refuse_labels(run: OwnRun, mix: MixConfig) -> None:
    """Raises ConfigError if the run's router reads labels, which it knows of its own mix only."""
    if run.config.routing.needs_domains:
        raise ConfigError(
            f"the routing of {run.folder} (router {run.config.routing.router.name}) reads the domain of every token, "
            f"and it knows those of '{run.config.data.mix.name}' only, not of '{mix.name}'; give its own mix"
        )


def store_of(documents: Mapping[str, Sequence[Document]], run: OwnRun, cache_dir: Path) -> Store:
    """Returns other text in the run's own tokens, as a store in memory whose split `VALIDATION` has all of it.

    The domains are unlabelled for the model, since it has not learned their numbers.
    """
    texts = [document.text for of_domain in documents.values() for document in of_domain]
    tokens = tokenise(texts, run.store.tokenizer_path, cache_dir)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in tokens])]).astype(np.int64)
    ends = np.cumsum([len(of_domain) for of_domain in documents.values()])
    regions = tuple(
        Region(int(end) - len(of_domain), int(end), int(starts[end - len(of_domain)]), int(starts[end]))
        for end, of_domain in zip(ends, documents.values(), strict=True)
    )
    empty = (Region(0, 0, 0, 0),) * len(documents)
    return Store(
        path=run.store.path,
        domains=tuple(documents),
        labels=(UNLABELLED,) * len(documents),
        vocab_size=run.store.vocab_size,
        regions={split: regions if split == VALIDATION else empty for split in SPLITS},
        tokens=np.concatenate(tokens),
        document_starts=starts,
    )
