"""What a training starts from: another run, or a folder that `moe-testbed export` has written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.checkpoint.checkpoints import newest_whole
from moe_testbed.launcher.checkpoint.stale import has_started
from moe_testbed.launcher.checkpoint.weights import model_state, stamp
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.export.folder import file_digest, is_export
from moe_testbed.launcher.export.source import open_export, refuse_stale_start
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.ownership import refuse_foreign_code
from moe_testbed.launcher.run.records import LedgerRecord, Manifest
from moe_testbed.launcher.run.steps import step_of
from moe_testbed.model.config import ENCODER


@dataclass(frozen=True)
class Parent:
    """What another training starts from.

    Attributes:
        path: the folder of a run, or of an export.
        config: what it was trained by.
        step: optimizer steps completed in it.
        stamp: of the files of its weights.
        ledger: what it has taken; None if that is not known.
        state: reads weights and buffers, by our names.
    """

    path: Path
    config: ExperimentConfig
    step: int
    stamp: str
    ledger: LedgerRecord | None
    state: Callable[[], Mapping[str, Tensor]]


def find_parent(config: ExperimentConfig, run_dir: Path, store: Store, trust: bool = False) -> Parent | None:
    """Returns what an experiment starts from; None if it starts from its seed, or has a checkpoint already.

    Args:
        trust: a router that the config of another user's run names may be imported. Weights need no trust.

    Raises:
        ConfigError: there is no such run or export, the run is not finished, the export is damaged, or it has no
            encoder or another tokenizer; or it has other weights than the run in this folder has started from; or it
            is another user's and names code.
    """
    start = config.start.encoder
    if start is None:
        return None
    path, own = start.folder(run_dir, config.seed), RunFolder(run_dir)
    if has_started(own):
        refuse_stale_start(own, path, trust)
        return None
    place = f"start.encoder.run is {start.run}"
    if RunFolder(path).is_run:
        parent = _run(RunFolder(path), config, store, place, trust)
    elif is_export(path):
        parent = _export(path, config, store, place, trust)
    else:
        raise ConfigError(
            f"{place}, but {path} is no folder of a run and no export; give the folder of one, or the label of another "
            "run of the same suite"
        )
    if ENCODER not in parent.config.model.stacks:
        raise ConfigError(
            f"{place}, but the model in {path} has model.architecture {parent.config.model.architecture}, without an "
            "encoder; start from another one"
        )
    return parent


def _run(folder: RunFolder, config: ExperimentConfig, store: Store, place: str, trust: bool) -> Parent:
    """Returns a finished run on the same data. Raises ConfigError."""
    if not trust:
        refuse_foreign_code(folder.read_config_tree(), folder.path, folder.config_file, folder.checkpoints)
    theirs, status = folder.read_config(), folder.read_status()
    if not folder.is_finished:
        raise ConfigError(
            f"{place}, but the run in {folder.path} is not finished ({status.state}, step {status.step} of "
            f"{theirs.training.steps}); train it to its end first"
        )
    checkpoint = newest_whole(folder.checkpoints)
    if checkpoint is None:
        raise ConfigError(
            f"{place}, but the run in {folder.path} has no whole checkpoint left; remove it to train it anew"
        )
    if folder.is_on_other_data(Manifest(store.manifest)):
        raise ConfigError(
            f"{place}, but the run in {folder.path} was trained on the mix '{theirs.data.mix.name}' as it was built "
            f"then, and its tokens are not those of '{config.data.mix.name}' as it is now; train both on one mix"
        )
    ledger = LedgerRecord.of(folder.read_summary().ledger)
    return Parent(folder.path, theirs, step_of(checkpoint), stamp(checkpoint), ledger, lambda: model_state(checkpoint))


def _export(path: Path, config: ExperimentConfig, store: Store, place: str, trust: bool) -> Parent:
    """Returns an export with the tokenizer of the mix. Raises ConfigError."""
    export = open_export(path, trust)
    if export.tokenizer != file_digest(store.tokenizer_path):
        raise ConfigError(
            f"{place}, but the model in {path} has the tokenizer of the mix '{export.config.data.mix.name}' as it was "
            f"built then, and not that of '{config.data.mix.name}' as it is now; train both on one mix"
        )
    return Parent(path, export.config, export.step, export.stamp, export.ledger, export.state)
