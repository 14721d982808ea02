"""Opens one of our runs for what is done with it after its training, on one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_testbed.data.build import build_store
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.checkpoint.checkpoints import newest_whole
from moe_testbed.launcher.checkpoint.weights import model_state
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import language_model, setting_on
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.ownership import refuse_foreign_code
from moe_testbed.launcher.run.records import Manifest
from moe_testbed.launcher.run.steps import step_of
from moe_testbed.model.language_model import LanguageModel


@dataclass(frozen=True)
class OwnRun:
    """A run that has a whole checkpoint.

    Attributes:
        folder: the folder of the run.
        config: the config of the run, for one process.
        store: the token store of the run's own mix.
        checkpoint: folder of the newest whole checkpoint.
        step: optimizer steps completed in it.
    """

    folder: Path
    config: ExperimentConfig
    store: Store
    checkpoint: Path
    step: int


def open_run(folder: Path, cache_dir: Path | None, log: Any, trust: bool = False) -> OwnRun:
    """Reads a run's folder; its token store is built if it is not there.

    Args:
        cache_dir: where the token store is; None: where the training had it.
        trust: a router that the config of another user's run names may be imported. Weights need no trust.

    Raises:
        CheckpointError: no whole checkpoint, or data that have changed since the training.
        ConfigError, DataError: the config cannot be read, the data cannot be had.
    """
    run = RunFolder(folder)
    if not trust:
        refuse_foreign_code(run.read_config_tree(), run.path, run.config_file, run.checkpoints)
    config = run.read_config()
    # One process holds all experts.
    changes: dict[str, Any] = {"parallel": config.parallel.model_copy(update={"expert_parallel_size": 1})}
    if cache_dir is not None:
        changes["data"] = config.data.model_copy(update={"cache_dir": str(cache_dir)})
    config = config.model_copy(update=changes)
    checkpoint = newest_whole(run.checkpoints)
    if checkpoint is None:
        raise CheckpointError(f"{folder} has no whole checkpoint; continue its training to the next one")
    store = build_store(config.data.mix, Path(config.data.cache_dir), log)
    if run.is_on_other_data(Manifest(store.manifest)):
        raise CheckpointError(
            f"{folder} was trained on other data than {store.path} holds (see both {run.manifest_file.name}); its "
            "tokenizer would not fit; choose the right --cache-dir"
        )
    return OwnRun(folder, config, store, checkpoint, step_of(checkpoint))


def load_model(run: OwnRun) -> LanguageModel:
    """Returns the model of a run on the CPU, in float32 and evaluation mode. Raises CheckpointError if the files do not
    fit the config, or a weight is not finite."""
    model = language_model(run.config, run.store.vocab_size, setting_on(run.config, run.store)).eval()
    try:
        model.load_state_dict(model_state(run.checkpoint))
    except RuntimeError as error:
        raise CheckpointError(f"{run.checkpoint} does not fit the config of {run.folder}: {error}") from error
    for name, weight in model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise CheckpointError(
                f"{run.checkpoint} has weights that are not finite (nan or inf), such as {name}; remove it, and the "
                "one before is exported"
            )
    return model
