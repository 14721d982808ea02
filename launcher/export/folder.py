"""The folder of an export: written whole or not at all, and what in it is ours."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_testbed.launcher.checkpoint.own_run import OwnRun
from moe_testbed.launcher.checkpoint.weights import digest
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.files import read_json
from moe_testbed.launcher.run.folder import RunFolder

FORMAT = 2
"""Since 2 an export tells its tokenizer and its files, so that a training can start from it."""

_RECORD, _REST, _WEIGHTS = "testbed.json", "testbed.safetensors", "model*.safetensors"


def record_file(folder: Path) -> Path:
    """Returns the file by which an export is known, and from which a training can start."""
    return folder / _RECORD


def rest_file(folder: Path) -> Path:
    """Returns the file of what an encoder needs in training alone, for which the class beside it has no place. There is
    none where nothing is left over."""
    return folder / _REST


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights and buffers."""
    return [*sorted(folder.glob(_WEIGHTS)), *([rest_file(folder)] if rest_file(folder).is_file() else [])]


def record_of(run: OwnRun, written: Path) -> dict[str, Any]:
    """Returns what stands in it: what a training that starts from here must know of the run.

    Args:
        written: the folder, with the weights in it.
    """
    folder = RunFolder(run.folder)
    return {
        "format": FORMAT,
        "config": folder.read_config_tree(),
        "manifest": run.store.manifest,
        "tokenizer": file_digest(run.store.tokenizer_path),
        "step": run.step,
        "digest": digest(run.checkpoint),
        "files": {path.name: file_digest(path) for path in weight_files(written)},
        "ledger": folder.read_summary().ledger,
    }


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file. Raises OSError."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def is_export(folder: Path) -> bool:
    """Tells whether `moe-testbed export` has written a folder."""
    return isinstance(read_record(folder).get("format"), int)


def read_record(folder: Path) -> Mapping[str, Any]:
    """Returns what `record_of` has returned; empty if there is none."""
    return read_json(record_file(folder))


def refuse_occupied(out: Path, overwrite: bool) -> None:
    """Raises ConfigError if a folder holds something that must stay."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_export(out):
        raise ConfigError(f"--out {out} is there already and no earlier export; choose another folder")
    if not overwrite:
        raise ConfigError(f"--out {out} holds an earlier export; choose another folder, or give --overwrite")


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that takes its name once it is filled, and is gone after an error.

    Args:
        overwrite: an earlier export of this name is replaced.

    Raises:
        ConfigError: something is there that must stay.
    """
    refuse_occupied(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    # A dot in front would do as well, but transformers makes a module's name of it.
    filling, former = (out.with_name(f"{out.name}_{what}_{os.getpid()}") for what in ("filling", "former"))
    filling.mkdir()
    try:
        yield filling
        refuse_occupied(out, overwrite)
        if out.exists():
            os.replace(out, former)
        os.replace(filling, out)
    finally:
        for left in (filling, former):
            shutil.rmtree(left, ignore_errors=True)
