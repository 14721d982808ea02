"""The files of a checkpoint as DeepSpeed names them, read from any number of processes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from moe_testbed.launcher.errors import CheckpointError

MODULE = "mp_rank_00_model_states.pt"
"""The file of all weights and buffers but the experts'; without ZeRO, also of the optimizer's state of rank 0."""

EXPERTS = "*_expert_*_model_states.pt"
"""The files of the experts: one per layer and expert, by its number among all experts, whichever rank holds it."""


def read_file(path: Path, weights_only: bool = True) -> Any:
    """Returns what ``torch.save`` wrote, its tensors on the CPU and mapped: they come from the disk when they are used.

    Args:
        weights_only: False lets the file name classes, as those of DeepSpeed's optimizers do, and so run any code: for
            checkpoints that DeepSpeed is to load anyhow, of runs that `RunFolder.claim` has found to be the user's.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} cannot be read, it is damaged or missing; remove the checkpoint, and the one before it is used"
        ) from error
