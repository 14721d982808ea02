"""Labelled texts as a model reads them: cut into passages of pieces, and gathered into batches.

Shape legend: B sequences, L positions, M model width, X labels of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.objectives.base import PADDING
from moe_testbed.data.probes.alignment import NO_PIECE, PieceFinder
from moe_testbed.data.probes.base import Example, Kind
from moe_testbed.routing.records import RoutingContext

Int64 = npt.NDArray[np.int64]
_FEWEST_PIECES = 8


@dataclass(frozen=True)
class Passage:
    """A part of a labelled text that fits a model.

    Attributes:
        document: name of the document, the unit of resampling.
        token_ids_L: its pieces.
        labels: number of the class of each labelled word; of a sequence task one.
        places: where the first piece of each of these words stands; of a sequence task empty.
        words: each of these words with the one before and the one behind it; of a sequence task all words.
    """

    document: str
    token_ids_L: Int64
    labels: Int64
    places: Int64
    words: tuple[tuple[str, str, str], ...]


def passages_of(
    documents: Mapping[str, Sequence[Example]],
    classes: Sequence[str],
    kind: Kind,
    finder: PieceFinder,
    length: int,
    limit: int,
) -> list[Passage]:
    """Cuts the texts of documents into passages, of whole documents until there are enough labels.

    A word whose first piece is another word's, too, is left out. Of a sequence task, what is left of a text behind its
    last whole passage counts only if it is not very short, or is all of it.

    Args:
        documents: name -> its labelled texts.
        classes: names of the classes, in the order of their numbers.
        length: most pieces of a passage.
        limit: labels.
    """
    number_of = {name: number for number, name in enumerate(classes)}
    passages: list[Passage] = []
    labels = 0
    for name, examples in documents.items():
        if labels >= limit:
            break
        for example in examples:
            numbers = np.array([number_of[label] for label in example.labels], dtype=np.int64)
            cut = _words_of if kind == "token" else _texts_of
            found = list(cut(name, example, numbers, finder, length))
            passages += found
            labels += sum(len(passage.labels) for passage in found)
    return passages


def _words_of(name: str, example: Example, numbers: Int64, finder: PieceFinder, length: int) -> Iterator[Passage]:
    token_ids, places = finder.first_pieces(example.text, example.words)
    written = ["", *(example.text[start:end] for start, end in example.words), ""]
    own = np.flatnonzero(places != NO_PIECE)
    for begin in range(0, len(token_ids), length):
        words = own[(places[own] >= begin) & (places[own] < begin + length)]
        if len(words):
            around = tuple((written[word], written[word + 1], written[word + 2]) for word in words)
            yield Passage(name, token_ids[begin : begin + length], numbers[words], places[words] - begin, around)


def _texts_of(name: str, example: Example, numbers: Int64, finder: PieceFinder, length: int) -> Iterator[Passage]:
    token_ids = finder.token_ids(example.text)
    for begin in range(0, len(token_ids), length):
        part = token_ids[begin : begin + length]
        if begin and len(part) < _FEWEST_PIECES:
            return
        words = finder.decode(part.tolist()).split()
        yield Passage(name, part, numbers, np.zeros(0, dtype=np.int64), tuple(("", word, "") for word in words))


@dataclass(frozen=True)
class Readings:
    """Makes what a model reads of texts that are not its own mix's.

    Args:
        domain: number of the domain that all of it belongs to; `UNLABELLED` if none.
    """

    domain: int
    device: torch.device

    def context(self, rows: Sequence[Int64], encoder: RoutingContext | None = None) -> RoutingContext:
        """Returns texts side by side, padded to the longest.

        Args:
            encoder: the same of the texts that an encoder reads.
        """
        longest = max(map(len, rows))
        token_ids_BL = np.full((len(rows), longest), PADDING, dtype=np.int64)
        valid_BL = np.zeros(token_ids_BL.shape, dtype=np.bool_)
        for row, ids in enumerate(rows):
            token_ids_BL[row, : len(ids)], valid_BL[row, : len(ids)] = ids, True
        tokens = torch.from_numpy(token_ids_BL).to(self.device)
        return RoutingContext(
            token_ids_BL=tokens,
            domain_BL=torch.full_like(tokens, self.domain),
            document_BL=None,
            position_BL=torch.arange(longest, device=self.device).expand(len(rows), longest),
            sequence_B=torch.arange(len(rows), device=self.device),
            valid_BL=torch.from_numpy(valid_BL).to(self.device),
            encoder=encoder,
        )


@dataclass(frozen=True)
class LabelledBatch:
    """Passages with the states of what carries their labels.

    Attributes:
        context: what a model reads.
        labels_X: number of the class of each label, in the order of the passages.
        rows_X, places_X: passage and position of the word that a label is of; None: labels are of whole passages.
    """

    context: RoutingContext
    labels_X: Tensor
    rows_X: Tensor | None
    places_X: Tensor | None

    @classmethod
    def of(cls, passages: Sequence[Passage], kind: Kind, readings: Readings) -> LabelledBatch:
        """Returns the batch of these passages."""

        def move(parts: Sequence[Int64]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts)).to(readings.device)

        context = readings.context([passage.token_ids_L for passage in passages])
        labels_X = move([passage.labels for passage in passages])
        if kind == "sequence":
            return cls(context, labels_X, None, None)
        rows_X = move([np.full(len(passage.places), row) for row, passage in enumerate(passages)])
        return cls(context, labels_X, rows_X, move([passage.places for passage in passages]))

    def states(self, hidden_BLM: Tensor) -> Tensor:
        """Returns what stands for each label, [X, M]: the state of a word's first piece, or the mean over a passage."""
        if self.rows_X is not None:
            return hidden_BLM[self.rows_X, self.places_X]
        valid_BL1 = self.context.valid_BL.unsqueeze(-1)  # type: ignore[union-attr]
        return (hidden_BLM * valid_BL1).sum(dim=1) / valid_BL1.sum(dim=1)


def batches(passages: Sequence[Passage], size: int) -> Iterator[list[Passage]]:
    """Yields passages in their order, so many at a time."""
    for begin in range(0, len(passages), size):
        yield list(passages[begin : begin + size])


def parted(passages: Sequence[Passage], share: float) -> tuple[list[Passage], list[Passage]]:
    """Parts passages between documents: the last documents, about this share of them and at least one, come second."""
    names = list(dict.fromkeys(passage.document for passage in passages))
    second = set(names[-max(1, round(share * len(names))) :])
    return (
        [passage for passage in passages if passage.document not in second],
        [passage for passage in passages if passage.document in second],
    )
