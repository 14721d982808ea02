"""Generation tasks: what text a sequence-to-sequence model writes for another one.

Shape legend: B sequences, L positions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.objectives import NO_TARGET, SpecialIds
from moe_testbed.data.objectives.base import PADDING, shifted
from moe_testbed.data.probes.alignment import PieceFinder
from moe_testbed.data.probes.base import Example
from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT
from moe_testbed.launcher.probing.fine_tuning import DEVELOPMENT, best_rate, diverged, fine_tune
from moe_testbed.launcher.probing.floors import word_by_word
from moe_testbed.launcher.probing.passages import Readings
from moe_testbed.launcher.probing.scores import Float64, ngram_counts, summed
from moe_testbed.model.decoding.greedy import write_greedily
from moe_testbed.model.language_model import LanguageModel

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """A text to read and the text to write, as text and as pieces."""

    document: str
    given: str
    wanted: str
    given_L: Int64
    wanted_L: Int64


def pairs_of(
    documents: Mapping[str, Sequence[Example]], finder: PieceFinder, given: int, wanted: int, limit: int
) -> tuple[list[Pair], int]:
    """Returns the pairs of whole documents until there are enough, and how many were too long.

    Args:
        given, wanted: most pieces of the texts; the second one's end is a piece, too.
        limit: pairs.
    """
    pairs: list[Pair] = []
    too_long = 0
    for name, examples in documents.items():
        if len(pairs) >= limit:
            break
        for example in examples:
            text = example.labels[0]
            given_L, wanted_L = finder.token_ids(example.text), finder.token_ids(text)
            if 0 < len(given_L) <= given and 0 < len(wanted_L) < wanted:
                pairs.append(Pair(name, example.text, text, given_L, np.append(wanted_L, END_OF_DOCUMENT)))
            else:
                too_long += 1
    return pairs, too_long


@dataclass(frozen=True)
class Generation:
    """A task with the pairs of one tokenizer and length.

    Attributes:
        length: most pieces that a model writes, the end included.
        ids: of its special tokens.
        finder: the tokenizer.
    """

    task: TaskConfig
    train: Sequence[Pair]
    test: Sequence[Pair]
    readings: Readings
    length: int
    ids: SpecialIds
    finder: PieceFinder

    def copied(self) -> Float64:
        """Returns what the given texts themselves come to; all counts are what the task's measure
        sums, for each seed and document."""
        return self.counted([[pair.given for pair in self.test]])

    def word_by_word(self) -> Float64:
        """Returns what `floors.word_by_word` comes to."""
        known = [Example(pair.given, (pair.wanted,)) for pair in self.train]
        return self.counted([word_by_word(known, [pair.given for pair in self.test])])

    def fine_tuned(self, name: str, models: Sequence[LanguageModel]) -> tuple[list[list[str]], float]:
        """Returns what fine-tuned models write for the test, a list for each seed, and the learning rate.

        Args:
            name: of what is trained, for messages.
            models: one for each seed; they stay as they are.

        Raises:
            CheckpointError: it diverges.
        """
        learning = self.task.learning
        cut = max(1, round((1 - DEVELOPMENT) * len(self.train)))
        learned, judged = self.train[:cut], self.train[cut:] or self.train

        def quality(rate: float) -> float:
            model = self._trained(models[0], learned, rate, learning.seeds[0])
            return float("nan") if model is None else -self._loss(model, judged)

        rate = best_rate(name, learning, quality)
        written = []
        for model, seed in zip(models, learning.seeds, strict=True):
            trained = self._trained(model, self.train, rate, seed)
            if trained is None:
                raise diverged(name, [rate])
            written.append(self._write(trained))
        return written, rate

    def counted(self, written: Sequence[Sequence[str]]) -> Float64:
        """Returns what the task's measure sums of written texts, for each seed and document."""
        documents = [pair.document for pair in self.test]
        names = list(dict.fromkeys(documents))
        return np.stack([summed(documents, names, map(self._counts, texts, self.test)) for texts in written])

    def _counts(self, text: str, pair: Pair) -> Float64:
        if self.task.metric == "chrf":
            return ngram_counts(text, pair.wanted)
        return np.array([float(text == pair.wanted), 1.0])

    def _trained(self, model: LanguageModel, pairs: Sequence[Pair], rate: float, seed: int) -> LanguageModel | None:
        """A copy of the model after a training; None if that diverges. It stays in evaluation mode, in which it has no
        noise, and its balancers do not move."""
        model = copy.deepcopy(model).eval()
        whole = fine_tune(
            model.parameters(), lambda batch: self._mean_loss(model, batch), pairs, self.task.learning, rate, seed
        )
        return model if whole else None

    def _mean_loss(self, model: LanguageModel, pairs: Sequence[Pair]) -> Tensor:
        encoder = self.readings.context([pair.given_L for pair in pairs])
        context = self.readings.context([shifted(pair.wanted_L, self.ids.start) for pair in pairs], encoder)
        targets_BL = torch.full_like(context.token_ids_BL, NO_TARGET)
        for row, pair in enumerate(pairs):
            targets_BL[row, : len(pair.wanted_L)] = torch.from_numpy(pair.wanted_L)
        loss: Tensor = model(context, targets_BL).loss
        return loss

    @torch.no_grad()
    def _loss(self, model: LanguageModel, pairs: Sequence[Pair]) -> float:
        size = self.task.learning.batch_size
        parts = [pairs[begin : begin + size] for begin in range(0, len(pairs), size)]
        return sum(float(self._mean_loss(model, part)) * len(part) for part in parts) / len(pairs)

    def _write(self, model: LanguageModel) -> list[str]:
        texts: list[str] = []
        size = self.task.learning.batch_size
        for begin in range(0, len(self.test), size):
            part = self.test[begin : begin + size]
            read = self.readings.context([pair.given_L for pair in part])
            begun_BL = torch.full((len(part), 1), self.ids.start, device=self.readings.device)
            written_BL = write_greedily(model, begun_BL, self.length, END_OF_DOCUMENT, PADDING, read)
            for row in written_BL[:, 1:].tolist():
                ids = row[: row.index(END_OF_DOCUMENT)] if END_OF_DOCUMENT in row else row
                texts.append(self.finder.decode([number for number in ids if number < self.ids.pieces]))
        return texts
