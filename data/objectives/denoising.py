"""Denoising: a decoder restores what is missing in the text that the encoder reads.

Shape legend: B sequences, L positions, X gaps of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moe_testbed.data.objectives.base import (
    DECODER,
    ENCODER,
    Int64,
    Objective,
    Reading,
    SpecialIds,
    Task,
    keys_of,
    objective_names,
    padded,
    shifted,
    uniform,
)
from moe_testbed.data.tokens.sampler import Batch

_COUNT, _LENGTHS, _POINTS = 11, 12, 13
_COPIED, _FIRST, _REST, _MARK = range(4)


@dataclass(frozen=True)
class Gaps:
    """What is missing of a sequence.

    starts_X, lengths_X: the gaps, in order; at least one token is kept between two of them.
    missing_L: whether each token is in a gap.
    """

    starts_X: Int64
    lengths_X: Int64
    missing_L: npt.NDArray[np.bool_]


@objective_names.register("denoising")
class Denoising(Objective):
    """Restores spans that were taken out, as the whole text (AlexaTM 20B, arXiv 2208.01448) or alone (T5, arXiv
    1910.10683).

    How many tokens go is drawn for each sequence, evenly from half to one and a half of the rate: the same number each
    time would tell the model how much is missing. Lengths of spans are Poisson's, at least 1.
    """

    name: str = "denoising"
    architecture: ClassVar[str] = "encoder_decoder"
    kinds: ClassVar[tuple[str, ...]] = ("copied", "first_of_gap", "rest_of_gap", "mark")
    rate: float = Field(0.15, gt=0, le=0.5, description="mean share of the tokens that are taken out")
    mean_span: float = Field(3.0, ge=1, allow_inf_nan=False, description="mean of the Poisson distribution of lengths")
    mark: Literal["none", "mask", "sentinel"] = Field(
        "none", description="what the encoder reads in a gap: nothing, one mask, or a mark of the gap's own"
    )
    target: Literal["whole", "spans"] = Field(
        "whole", description="whole: the decoder writes the whole text; spans: the gaps alone, each after its mark"
    )

    @model_validator(mode="after")
    def _spans_have_marks(self) -> Denoising:
        if self.target == "spans" and self.mark != "sentinel":
            raise ValueError(
                f"objective.target is spans with objective.mark {self.mark}, so that nothing says which gap a span is "
                "from; set objective.mark to sentinel, or objective.target to whole"
            )
        return self

    def apply(self, batch: Batch, stream: Sequence[int], ids: SpecialIds) -> Task:
        tokens_BL = batch.token_ids_BL
        L = tokens_BL.shape[1]
        gaps = self._gaps(batch, stream)
        marks = [self._marks(len(of_row.starts_X), ids) for of_row in gaps]
        lengths = self.lengths(L)
        read = [_read(row, of_row, own) for row, of_row, own in zip(tokens_BL, gaps, marks, strict=True)]
        encoder = padded(read, lengths[ENCODER])
        if self.target == "whole":
            source_BL = np.broadcast_to(np.maximum(np.arange(L) - 1, 0), tokens_BL.shape)
            decoder = Reading(shifted(tokens_BL, ids.start), source_BL)
            kinds_BL = np.stack([_kinds(of_row.missing_L) for of_row in gaps])
            return Task({ENCODER: encoder, DECODER: decoder}, tokens_BL, kinds_BL)
        written = [_written(row, of_row, ids.pieces) for row, of_row in zip(tokens_BL, gaps, strict=True)]
        target = padded([(of_row, source) for of_row, source, _ in written], lengths[DECODER])
        kinds = padded([(kinds, source) for _, source, kinds in written], lengths[DECODER]).token_ids_BX
        decoder = Reading(shifted(target.token_ids_BX, ids.start), shifted(target.source_BX, 0), target.valid_BX)
        return Task({ENCODER: encoder, DECODER: decoder}, target.targets_BX, kinds)

    def lengths(self, sequence_length: int) -> dict[str, int]:
        low, high = self._limits(sequence_length)
        most = self._most_gaps(sequence_length)
        encoder = sequence_length - low + (0 if self.mark == "none" else most)
        return {ENCODER: encoder, DECODER: sequence_length if self.target == "whole" else high + most + 1}

    def shortest(self, sequence_length: int) -> int:
        low, high = self._limits(sequence_length)
        return sequence_length - high if self.target == "whole" else min(sequence_length - high, low + 2)

    def special_ids(self, pieces: int, sequence_length: int) -> SpecialIds:
        # The mark behind the last span ends the text of a decoder.
        return SpecialIds(pieces, self._most_gaps(sequence_length) + 1 if self.mark == "sentinel" else 0)

    def mean_targets(self, sequence_length: int) -> float:
        if self.target == "whole":
            return float(sequence_length)
        # With one mark a gap, and one behind the last.
        missing = sum(self._limits(sequence_length)) / 2
        return missing + missing / self.mean_span + 1

    def targets(self, ids: SpecialIds) -> range:
        return range(ids.pieces + (ids.sentinels if self.target == "spans" else 0))

    def refusal(self, sequence_length: int) -> str | None:
        low, _ = self._limits(sequence_length)
        if low:
            return None
        return (
            f"data.sequence_length is {sequence_length} with objective.rate {self.rate:g}, so that nothing would be "
            f"taken out of some sequences; use at least {math.ceil(2 / self.rate)} tokens, or a higher rate"
        )

    def _limits(self, sequence_length: int) -> tuple[int, int]:
        """Returns the fewest and the most tokens that are taken out."""
        low = int(self.rate * sequence_length / 2)
        return low, round(2 * self.rate * sequence_length) - low

    def _most_gaps(self, sequence_length: int) -> int:
        """Returns twice as many gaps as the longest text has on average; a row of draws that asks for more is cut."""
        return max(1, math.ceil(2 * self._limits(sequence_length)[1] / self.mean_span))

    def _marks(self, gaps: int, ids: SpecialIds) -> Int64 | None:
        if self.mark == "none":
            return None
        return np.full(gaps, ids.mask) if self.mark == "mask" else ids.pieces + np.arange(gaps)

    def _gaps(self, batch: Batch, stream: Sequence[int]) -> list[Gaps]:
        """Returns the gaps of every sequence."""
        L = batch.token_ids_BL.shape[1]
        low, high = self._limits(L)
        most = self._most_gaps(L)
        missing_B = low + (uniform(keys_of(stream, batch, _COUNT), 1)[:, 0] * (high - low + 1)).astype(np.int64)
        lengths_BX = np.maximum(_poisson(uniform(keys_of(stream, batch, _LENGTHS), most), self.mean_span), 1)
        draws_BL = uniform(keys_of(stream, batch, _POINTS), L + 1)
        return [
            _gaps_of(lengths_X, draws_L, int(missing), L)
            for lengths_X, draws_L, missing in zip(lengths_BX, draws_BL, missing_B, strict=True)
        ]


def _gaps_of(lengths_X: Int64, draws_L: npt.NDArray[np.float64], missing: int, length: int) -> Gaps:
    """Returns gaps of these lengths, as many as make up what is missing, in front of kept tokens drawn without
    repetition (or behind the last)."""
    kept = length - missing
    count = min(int(np.searchsorted(np.cumsum(lengths_X), missing)) + 1, len(lengths_X), kept + 1)
    lengths_X = lengths_X[:count].copy()
    lengths_X[-1] = missing - lengths_X[:-1].sum()
    points_X = np.sort(np.argsort(draws_L[: kept + 1], kind="stable")[:count])
    starts_X = points_X + np.cumsum(lengths_X) - lengths_X
    missing_L = np.zeros(length, dtype=np.bool_)
    for start, size in zip(starts_X, lengths_X, strict=True):
        missing_L[start : start + size] = True
    return Gaps(starts_X, lengths_X, missing_L)


def _poisson(draws: npt.NDArray[np.float64], mean: float) -> Int64:
    """Returns Poisson's numbers by inversion of the distribution function."""
    number, probability = 0, math.exp(-mean)
    cumulated = [probability]
    while cumulated[-1] < 1 - 1e-12 and number < 20 * mean + 100:
        number += 1
        probability *= mean / number
        cumulated.append(cumulated[-1] + probability)
    return np.searchsorted(np.array(cumulated), draws, side="right").astype(np.int64)


def _read(row_L: Int64, gaps: Gaps, marks_X: Int64 | None) -> tuple[Int64, Int64]:
    """Returns what the encoder reads, and its sources."""
    places = np.arange(len(row_L))
    if marks_X is None:
        return row_L[~gaps.missing_L], places[~gaps.missing_L]
    marked_L = row_L.copy()
    marked_L[gaps.starts_X] = marks_X
    read_L = ~gaps.missing_L
    read_L[gaps.starts_X] = True
    return marked_L[read_L], places[read_L]


def _written(row_L: Int64, gaps: Gaps, first_mark: int) -> tuple[Int64, Int64, Int64]:
    """Returns the spans, each after its mark, and the mark that ends them; their sources; and their kinds."""
    ids: list[int] = []
    source: list[int] = []
    kinds: list[int] = []
    for number, (start, size) in enumerate(zip(gaps.starts_X, gaps.lengths_X, strict=True)):
        ids += [first_mark + number, *row_L[start : start + size]]
        source += [int(start), *range(start, start + size)]
        kinds += [_MARK, _FIRST, *[_REST] * (size - 1)]
    return (
        np.array([*ids, first_mark + len(gaps.starts_X)]),
        np.array([*source, len(row_L) - 1]),
        np.array([*kinds, _MARK]),
    )


def _kinds(missing_L: npt.NDArray[np.bool_]) -> Int64:
    before_L = np.concatenate([[False], missing_L[:-1]])
    return np.where(missing_L, np.where(before_L, _REST, _FIRST), _COPIED)
