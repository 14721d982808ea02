"""What `moe-testbed analyze` is asked for, and what comes of one checkpoint."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from moe_testbed.data.config import MixConfig
from moe_testbed.launcher.errors import visible
from moe_testbed.launcher.run import environment
from moe_testbed.launcher.run.arrays import Ablation, Evaluation
from moe_testbed.launcher.run.records import Manifest, Summary

Split = Literal["validation", "tuning", "train", "all"]
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Request:
    """What the user asks for. Options that are None have a default that depends on the kind of checkpoint.

    Attributes:
        mix: labelled text.
        split: the documents of the mix that are read.
        sequences_per_domain, sequence_length, batch_size: how much of it, and how much at once.
        examined_sequences: number of sequences of each domain for the causal measures of a run; 0 for none.
        tokenizer: folder or name of a tokenizer, for models of the hub's format.
        cache_dir: downloads and token stores.
        dtype: auto: as the checkpoint has it.
        trust: routers of other people that the config of another user's run names may be imported.
    """

    mix: MixConfig
    device: torch.device
    split: Split | None = None
    sequences_per_domain: int | None = None
    sequence_length: int | None = None
    batch_size: int | None = None
    examined_sequences: int | None = None
    tokenizer: str | None = None
    cache_dir: Path | None = None
    dtype: Dtype = "auto"
    trust: bool = False


@dataclass(frozen=True)
class Result:
    """What is written of one checkpoint.

    Attributes:
        description: one line for the report.
        evaluation: what its routing was; the step is 0 where the steps of the training are not known.
        ablation: what its experts cause; None where it was not made.
        config: content of the run folder's file.
        manifest: what it has read.
        summary: what is known of the checkpoint and of how it was analysed.
    """

    description: str
    evaluation: Evaluation
    config: dict[str, Any]
    summary: Summary
    manifest: Manifest
    ablation: Ablation | None = None


def log(text: str) -> None:
    """Tells on stderr."""
    print(visible(text), file=sys.stderr)


def made_here(device: torch.device) -> dict[str, Any]:
    """Returns how and where the analysis was made."""
    return {
        "peak_memory_bytes": environment.peak_memory_bytes(),
        "commit": environment.commit(),
        "hardware": environment.hardware(device),
        "command": environment.command(),
    }
