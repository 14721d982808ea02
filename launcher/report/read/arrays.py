"""The .npz files of a run folder, checked: an array that does not fit costs itself, not the report.

The letters behind a name's last underscore are its axes (docs/shapes.md). Shape legend: Y MoE layers (0 for a dense
model), D domains, E experts, O runs, I seeds, N evaluated sequences, C clusters of sequences that share a document, V
token ids, T tokens of the probe, W places for choices.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

DAMAGED = (OSError, ValueError, TypeError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
"""What reading a file that was cut off, overwritten or never was an .npz raises."""

COUNTS = (
    "counts_top_1_YDE",
    "counts_top_k_YDE",
    "dropped_YDE",
    "shuffled_counts_top_k_YDE",
    "cluster_counts_YCE",
    "vocabulary_counts_YVE",
)
"""Arrays of finite numbers of at least 0."""
DOMAIN_NUMBERS = ("sequence_domain_N", "cluster_domain_C", "owner_YE", "group_YE")
"""Arrays of numbers of domains, -1 for none."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation of a run; losses in nats per token, counts of assignments before any dropping."""

    step: int
    domains: tuple[str, ...]
    tokens_D: Integers
    loss_D: Floats
    sequence_loss_N: Floats
    sequence_domain_N: Integers
    counts_top_1_YDE: Integers
    counts_top_k_YDE: Integers
    dropped_YDE: Integers
    shuffled_counts_top_k_YDE: Integers
    sequence_cluster_N: Integers | None = None
    cluster_domain_C: Integers | None = None
    cluster_counts_YCE: Integers | None = None
    weight_YDE: Floats | None = None
    coactivation_YEE: Integers | None = None
    entropy_sum_YD: Floats | None = None
    probability_sum_YDE: Floats | None = None
    margin_sum_YD: Floats | None = None
    router_cosine_YEE: Floats | None = None
    vocabulary_ids_V: Integers | None = None
    vocabulary_counts_YVE: Integers | None = None

    @property
    def loss(self) -> float:
        """Mean over domains of equal weight."""
        return float(self.loss_D.mean())

    @property
    def tokens(self) -> int:
        """Tokens of all domains."""
        return int(self.tokens_D.sum())


@dataclass(frozen=True)
class Statistics:
    """The choices of the probe's tokens after one step (-1: none), and the counts of that step's training batch."""

    step: int
    expert_ids_YTW: Integers
    counts_top_k_YDE: Integers | None = None


@dataclass(frozen=True)
class Analysis:
    """What a sample of sequences loses when experts are barred, replaced or swapped, and how alike experts are.

    Losses are means over a sequence, in nats per token; nan where an expert was not part of the sample.
    """

    domains: tuple[str, ...]
    sequence_domain_N: Integers
    baseline_loss_N: Floats
    owner_YE: Integers | None = None
    group_YE: Integers | None = None
    ablation_loss_YEN: Floats | None = None
    mean_loss_YEN: Floats | None = None
    forced_loss_DN: Floats | None = None
    expert_cosine_YEE: Floats | None = None
    expert_cka_YEE: Floats | None = None
    effective_rank_Y: Floats | None = None
    weight_cosine_YEE: Floats | None = None
    redundancy_tokens: int | None = None


def paired_losses(runs: Sequence[Sequence[Evaluation]]) -> tuple[Floats, Integers, Integers | None]:
    """The sequence losses [O, I, N] of O runs under I seeds, and domain and cluster of each sequence [N].

    All of them were evaluated on the same sequences, so that the clusters of one are those of all: None where none has
    them. Sequences without a domain are left out.
    """
    evaluations = [evaluation for run in runs for evaluation in run]
    domain_N = evaluations[0].sequence_domain_N
    labelled_N = domain_N >= 0
    losses_OIN = np.stack([[evaluation.sequence_loss_N[labelled_N] for evaluation in run] for run in runs])
    clusters = next((e.sequence_cluster_N for e in evaluations if e.sequence_cluster_N is not None), None)
    return losses_OIN, domain_N[labelled_N], None if clusters is None else clusters[labelled_N]


def read_evaluation(folder: Path, last_step: int) -> tuple[Evaluation, list[str]]:
    """A run's last evaluation, and what of it was left out.

    Raises one of `DAMAGED` if there is none of the last step, or if what every report needs is not whole.
    """
    paths = sorted((folder / "evaluations").glob("step_*.npz"))
    if not paths:
        raise ValueError("there is none")
    content = _load(paths[-1])
    if int(content["step"]) != last_step:
        raise ValueError(f"the last one is of step {int(content['step'])}, the training ended at {last_step}")
    if np.any(content["tokens_D"] <= 0):
        raise ValueError("a domain has no tokens in it")
    content["loss_D"] = content["loss_sum_D"].astype(np.float64) / content["tokens_D"]
    found, left_out = _record(Evaluation, content, first=("counts_top_k_YDE", "sequence_loss_N"))
    counts_YDE = found.counts_top_k_YDE
    if len(counts_YDE) and not counts_YDE.size:
        raise ValueError(f"counts_top_k_YDE has shape {counts_YDE.shape}: no domains, or no experts")
    if not np.any(found.sequence_domain_N >= 0):
        raise ValueError("none of its sequences has a domain")
    if np.any(found.dropped_YDE > counts_YDE):
        raise ValueError("dropped_YDE exceeds counts_top_k_YDE, of which it is a part")
    if found.cluster_domain_C is not None and not np.any(found.cluster_domain_C >= 0):
        left_out.append("cluster_domain_C has no domain in it")
        found = replace(found, cluster_domain_C=None)
    return found, left_out


def read_statistics(path: Path) -> Statistics:
    """One statistics file. Raises one of `DAMAGED`."""
    found, left_out = _record(Statistics, _load(path, Statistics), first=("expert_ids_YTW",))
    if left_out:
        raise ValueError(left_out[0])
    return found


def read_analysis(folder: Path, domains: tuple[str, ...]) -> tuple[Analysis, list[str]]:
    """A run's analysis.npz, and what of it was left out.

    Raises one of `DAMAGED` if it cannot be used; FileNotFoundError, which is one of them, if there is none.
    """
    found, left_out = _record(Analysis, _load(folder / "analysis.npz"), first=("baseline_loss_N",))
    if found.domains != domains:
        raise ValueError("it is of other domains than the evaluation")
    return found, left_out


def _load(path: Path, kind: type[Any] | None = None) -> dict[str, Any]:
    """The arrays of a file; only those that a record of this kind has, if given."""
    with np.load(path) as arrays:
        wanted = arrays.files if kind is None else [field.name for field in fields(kind) if field.name in arrays.files]
        return {name: arrays[name] for name in wanted}


Record = TypeVar("Record", Evaluation, Statistics, Analysis)


def _record(kind: type[Record], content: dict[str, Any], first: tuple[str, ...]) -> tuple[Record, list[str]]:
    """The record, and a line for each optional array left out; the arrays named `first` decide the sizes."""
    values: dict[str, Any] = {}
    left_out = []
    sizes: dict[str, int] = {}
    if "domains" in content:
        sizes["D"] = len(content["domains"])
    known = sorted(fields(kind), key=lambda field: (field.name not in first, field.default is not MISSING))
    for field in known:
        if field.default is not MISSING and field.name not in content:
            continue
        value = content[field.name]
        axes = field.name.rpartition("_")[2]
        if field.name == "domains":
            values["domains"] = tuple(map(str, value))
        elif not axes.isupper():
            values[field.name] = int(value)
        elif (problem := _misfit(field.name, value, axes, sizes)) is None:
            sizes.update(zip(axes, value.shape, strict=True))
            values[field.name] = value.astype(np.int64 if "Integers" in str(field.type) else np.float64)
        elif field.default is MISSING:
            raise ValueError(problem)
        else:
            left_out.append(problem)
    return kind(**values), left_out


def _misfit(name: str, array: NDArray[Any], axes: str, sizes: dict[str, int]) -> str | None:
    expected = [sizes.get(axis) for axis in axes]
    fits = array.ndim == len(axes) and all(
        size is None or size == found for size, found in zip(expected, array.shape, strict=False)
    )
    if fits:
        return _out_of_range(name, array, sizes)
    wanted = " x ".join(axis if size is None else f"{size} {axis}" for axis, size in zip(axes, expected, strict=True))
    return f"{name} has shape {tuple(array.shape)} instead of {wanted}"


def _out_of_range(name: str, array: NDArray[Any], sizes: dict[str, int]) -> str | None:
    if array.dtype.kind not in "biuf":
        return f"{name} has values of type {array.dtype} instead of numbers"
    if name in COUNTS and not np.all((array >= 0) & np.isfinite(array)):
        return f"{name} has counts that are negative or not finite"
    if name in DOMAIN_NUMBERS and not np.all((array >= -1) & (array < sizes["D"])):
        return f"{name} has values from {array.min()} to {array.max()} instead of -1 to {sizes['D'] - 1}"
    return None
