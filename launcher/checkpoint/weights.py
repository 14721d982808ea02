"""The weights in a checkpoint, read in one process whatever ranks have written it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from moe_testbed.launcher.checkpoint.files import EXPERTS, MODULE, read_file


def model_state(checkpoint: Path) -> dict[str, Tensor]:
    """Returns weights and buffers by name, all experts under their numbers among all. Raises CheckpointError."""
    state: dict[str, Tensor] = {}
    for path in weight_files(checkpoint):
        content = read_file(path)
        state |= content["module"] if path.name == MODULE else content
    return state


def weight_files(checkpoint: Path) -> list[Path]:
    """Returns the files that hold them."""
    return [checkpoint / MODULE, *sorted(checkpoint.glob(EXPERTS))]


def digest(checkpoint: Path) -> str:
    """Returns a digest of weights and buffers: a training that was repeated has the same one, unless it differs."""
    return digest_of(model_state(checkpoint))


def digest_of(state: Mapping[str, Tensor]) -> str:
    """Returns the same of weights and buffers that were read."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def stamp(checkpoint: Path) -> str:
    """Returns a digest of names, sizes and times of the files that hold them: while it is the same, so are they. Of
    files that were copied, or written anew, it tells nothing."""
    return stamp_of(weight_files(checkpoint))


def stamp_of(paths: Iterable[Path]) -> str:
    """Returns the same of any files."""
    files = [(path.name, path.stat()) for path in paths]
    words = " ".join(f"{name} {about.st_size} {about.st_mtime_ns}" for name, about in files)
    return hashlib.sha256(words.encode()).hexdigest()
