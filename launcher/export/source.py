"""An export as what a training starts from: what is written for that, and how it is read back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from moe_testbed.launcher.checkpoint.stale import has_started, refuse_changed, refuse_stale
from moe_testbed.launcher.checkpoint.weights import digest_of, stamp_of
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import model_on_meta
from moe_testbed.launcher.config.renamed import with_new_names
from moe_testbed.launcher.errors import CheckpointError, ConfigError
from moe_testbed.launcher.export import native, own
from moe_testbed.launcher.export.conditions import EUROBERT, LLAMA, MIXTRAL, OWN
from moe_testbed.launcher.export.folder import (
    FORMAT,
    file_digest,
    is_export,
    read_record,
    record_file,
    rest_file,
    weight_files,
)
from moe_testbed.launcher.run.files import read_json
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.ownership import refuse_foreign_code
from moe_testbed.launcher.run.records import LedgerRecord
from moe_testbed.model.config import ENCODER
from moe_testbed.model.language_model import LanguageModel

_NEEDED = f"{ENCODER}.", "embedding."


def write_rest(folder: Path, model: LanguageModel, form: str) -> None:
    """Writes what an encoder needs in training and the class in the folder has no place for, such as the state of its
    balancers; no file where nothing is left over.

    Args:
        form: the `model_type` in transformers.
    """
    from safetensors.torch import save_file

    theirs = own.state_of(model) if form == OWN else native.state_of(model, form)
    known = _own_state(theirs, model, form)
    rest = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(f"{ENCODER}.") and name not in known
    }
    if rest:
        save_file(rest, rest_file(folder))


@dataclass(frozen=True)
class Export:
    """A folder that `moe-testbed export` has written, whole.

    Attributes:
        path: the path of the folder.
        config: what the run was trained by, as one process has it.
        step: optimizer steps completed in it.
        tokenizer: SHA-256 of the tokenizer's file of its mix.
        ledger: what the run has taken; None if that is not known.
    """

    path: Path
    config: ExperimentConfig
    step: int
    tokenizer: str
    ledger: LedgerRecord | None

    @property
    def stamp(self) -> str:
        """A digest of the files' names, sizes and times."""
        return stamp_of(weight_files(self.path))

    def state(self) -> dict[str, Tensor]:
        """Returns weights and buffers under our names. Raises CheckpointError if they are not those of the config."""
        from safetensors.torch import load_file

        model = model_on_meta(self.config)
        files = {path: load_file(path) for path in weight_files(self.path)}
        rest = files.pop(rest_file(self.path), {})
        theirs = {name: tensor for content in files.values() for name, tensor in content.items()}
        state = _own_state(theirs, model, str(read_json(self.path / "config.json").get("model_type"))) | rest
        for name, expected in model.state_dict().items():
            if name.startswith(_NEEDED) and (name not in state or state[name].shape != expected.shape):
                raise CheckpointError(
                    f"{self.path} has no {name} of shape {tuple(expected.shape)}, as the config in its "
                    f"{record_file(self.path).name} wants it; export the run anew"
                )
        return state


def open_export(folder: Path, trust: bool = False) -> Export:
    """Returns an export whose files are those that were written.

    Args:
        trust: a router that the config in another user's export names may be imported. Weights need no trust.

    Raises:
        ConfigError: it is of a version that says too little, it is damaged or was changed, or its config cannot be
            read; or it is another user's and names code; or safetensors is not installed.
    """
    record, file = read_record(folder), record_file(folder)
    tree, files, step = (record.get(key) for key in ("config", "files", "step"))
    if record.get("format") != FORMAT or not isinstance(tree, dict) or not isinstance(files, dict):
        raise ConfigError(
            f"{file} is of another version, from which no training starts: its format is {record.get('format')!r} and "
            f"not {FORMAT}; export the run anew"
        )
    if not trust:
        refuse_foreign_code(tree, folder, file, folder)
    _refuse_damaged(folder, files)
    ledger = LedgerRecord.of(record.get("ledger"))
    return Export(folder, _config_of(tree, file), int(step or 0), str(record.get("tokenizer")), ledger)


def refuse_stale_start(run: RunFolder, parent: Path, trust: bool = False) -> None:
    """Refuses a run that has started from other weights than there are now in the folder of a run, or of an export.
    Files are read only where they are not the ones any more that it has started from.

    Raises:
        ConfigError: it has; one line. Or the export is damaged.
    """
    if RunFolder(parent).is_run or not is_export(parent):
        refuse_stale(run, RunFolder(parent))
    elif has_started(run):
        stamp = stamp_of(weight_files(parent))
        refuse_changed(run, parent, stamp, lambda: digest_of(open_export(parent, trust).state()), "exported anew")


def _own_state(theirs: Mapping[str, Tensor], model: LanguageModel, form: str) -> dict[str, Tensor]:
    if form == OWN:
        return own.own_state(theirs, model)
    if form in (EUROBERT, LLAMA, MIXTRAL):
        return native.own_state(theirs, model, form)
    raise CheckpointError(f"config.json of the export has model_type {form}, which no export has; export the run anew")


def _config_of(tree: Mapping[str, Any], file: Path) -> ExperimentConfig:
    try:
        config = ExperimentConfig.model_validate(with_new_names(tree))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{file} holds a config that cannot be read: {place}: {first['msg']}") from error
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_parallel_size": 1})})


def _refuse_damaged(folder: Path, files: dict[str, Any]) -> None:
    try:
        import safetensors  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{folder} holds weights of safetensors, which is not installed; pip install 'moe-testbed[checkpoints]'"
        ) from None
    found = {path.name: file_digest(path) for path in weight_files(folder)}
    if wrong := sorted(name for name in files | found if files.get(name) != found.get(name)):
        what = "is missing" if wrong[0] not in found else "is not what was exported: it is damaged, or was changed"
        raise ConfigError(f"{folder / wrong[0]} {what}; export the run anew")
