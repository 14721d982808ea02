"""What an objective is: a pure function of (batch, stream, number of the sequence), the same on any ranks and after a
restart.

Shape legend: B sequences, L positions of a sequence, X positions of what a stack reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel

from moe_testbed.data.registry import Registry
from moe_testbed.data.tokens.permutation import key_of, mix_bits
from moe_testbed.data.tokens.sampler import Batch

NO_TARGET = -1
PADDING = 0
"""The id of padding: the tokenizer's unknown piece, which no text has since bytes stand in."""

ENCODER, DECODER = "encoder", "decoder"

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_ROWS_OF = 8


@dataclass(frozen=True)
class SpecialIds:
    """Token ids that stand for no text. They are numbered after the tokenizer's pieces, so that stores stay what they
    are, and the sentinels first, so that all ids that can be a target lie side by side.

    Attributes:
        pieces: V, ids of the tokenizer.
        sentinels: number of marks that tell the gaps of a sequence apart.
    """

    pieces: int
    sentinels: int = 0

    @property
    def start(self) -> int:
        """The id that a decoder reads first."""
        return self.pieces + self.sentinels

    @property
    def mask(self) -> int:
        """The id in the place of what is hidden."""
        return self.start + 1

    @property
    def rows(self) -> int:
        """How many rows an embedding has: all ids, and as many unused ones as make a multiple of eight."""
        return -(-(self.mask + 1) // _ROWS_OF) * _ROWS_OF


@dataclass(frozen=True)
class Reading:
    """What one stack reads.

    token_ids_BX: piece numbers and special ids.
    source_BX: place in the sequence of the text that each token stands for; of a mark, where its gap begins.
    valid_BX: False for padding; None where there is none.
    """

    token_ids_BX: Int64
    source_BX: Int64
    valid_BX: npt.NDArray[np.bool_] | None = None

    @property
    def targets_BX(self) -> Int64:
        """The ids where they are no padding, as targets."""
        return self.token_ids_BX if self.valid_BX is None else np.where(self.valid_BX, self.token_ids_BX, NO_TARGET)


@dataclass(frozen=True)
class Task:
    """What a model is given of a batch.

    readings: stack -> what it reads, from the input to the output.
    targets_BX: what the last stack is to predict at each of its places, NO_TARGET where nothing.
    kinds_BX: what each target is, as the number of one of the objective's kinds; None where there is one kind.
    """

    readings: Mapping[str, Reading]
    targets_BX: Int64
    kinds_BX: Int64 | None = None


class Objective(BaseModel, ABC, extra="forbid", frozen=True):
    """Turns text into a task; its fields are the options that a config may set.

    architecture: what it trains.
    kinds: the kinds of targets whose losses are told apart.
    all_ids_are_targets: there are no special ids, and every place has a target.
    """

    name: str
    architecture: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ()
    all_ids_are_targets: ClassVar[bool] = False

    @abstractmethod
    def apply(self, batch: Batch, stream: Sequence[int], ids: SpecialIds) -> Task:
        """Returns the task.

        stream: non-negative numbers that tell one stream of draws from others, such as a run's seed.
        ids: what `special_ids` returns.
        """

    @abstractmethod
    def lengths(self, sequence_length: int) -> dict[str, int]:
        """Returns how many tokens each stack reads of a sequence, padding included; the same for all sequences."""

    def shortest(self, sequence_length: int) -> int:
        """Returns how many tokens every stack reads at least of every sequence, without padding."""
        return min(self.lengths(sequence_length).values())

    def special_ids(self, pieces: int, sequence_length: int) -> SpecialIds:
        """Returns the special ids for a tokenizer of so many pieces."""
        return SpecialIds(pieces)

    def mean_targets(self, sequence_length: int) -> float:
        """Returns how many tokens of a sequence are to be predicted on average."""
        return float(sequence_length)

    def targets(self, ids: SpecialIds) -> range:
        """Returns the ids that can be a target; no other is in the softmax."""
        return range(ids.pieces)

    def refusal(self, sequence_length: int) -> str | None:
        """Returns why sequences of this length will not do; None if they will."""
        return None


objective_names: Registry[Objective] = Registry("objective", key="name")


def uniform(keys: npt.NDArray[np.uint64], count: int) -> Float64:
    """Returns so many numbers from [0, 1) for each key, float64 [keys, count]."""
    bits = mix_bits(keys[:, None] ^ mix_bits(np.arange(1, count + 1, dtype=np.uint64)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keys_of(stream: Sequence[int], batch: Batch, purpose: int) -> npt.NDArray[np.uint64]:
    """Returns a key for each sequence; draws for other purposes are independent."""
    return key_of(purpose, *stream, batch.sequence_B)


def padded(rows: Sequence[tuple[Int64, Int64]], length: int) -> Reading:
    """Returns a reading of rows of ids and their sources, each at most `length` long."""
    shape = (len(rows), length)
    token_ids_BX, source_BX = np.full(shape, PADDING, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    valid_BX = np.zeros(shape, dtype=np.bool_)
    for row, (ids, source) in enumerate(rows):
        token_ids_BX[row, : len(ids)], source_BX[row, : len(ids)], valid_BX[row, : len(ids)] = ids, source, True
    return Reading(token_ids_BX, source_BX, valid_BX)


def shifted(targets: Int64, start: int) -> Int64:
    """Returns what a decoder reads to predict these targets: the start, then all but the last; any batch dimensions."""
    first = np.full((*targets.shape[:-1], 1), start, dtype=np.int64)
    return np.concatenate([first, targets[..., :-1]], axis=-1)
