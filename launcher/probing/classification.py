"""Token and sequence tasks: which class a word or a text is of, by the states of an encoder.

Shape legend: B sequences, L positions, M model width, X labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.launcher.probing.fine_tuning import DEVELOPMENT, best_rate, diverged, fine_tune
from moe_testbed.launcher.probing.floors import labels_of, majority, word_features
from moe_testbed.launcher.probing.linear import linear_layer
from moe_testbed.launcher.probing.passages import LabelledBatch, Passage, Readings, batches, parted
from moe_testbed.launcher.probing.scores import MEASURES, Float64, confusion
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RoutingContext

Int64 = npt.NDArray[np.int64]
Encode = Callable[[RoutingContext], Tensor]
_HEAD_DEVIATION = 0.02


@dataclass(frozen=True)
class Classification:
    """A task with the passages of one tokenizer and length.

    Attributes:
        classes: number of classes.
        readings: how passages become what a model reads.
    """

    task: TaskConfig
    classes: int
    train: Sequence[Passage]
    test: Sequence[Passage]
    readings: Readings

    def majority(self) -> Float64:
        """Returns what the most frequent class comes to; all counts are those of
        `scores.confusion`, one table for each seed."""
        return self._counted([majority(self.train, self.test)])

    def word_features(self) -> Float64:
        """Returns what a linear model on words comes to."""
        return self._counted([word_features(self.train, self.test, self.task.kind)])

    def linear(self, encoders: Sequence[Encode]) -> Float64:
        """Returns what linear layers on the states of encoders come to, one seed for each of them."""
        found = []
        for encode in encoders:
            train_XM, test_XM = (self._states(encode, passages) for passages in (self.train, self.test))
            found.append(linear_layer(train_XM, labels_of(self.train), test_XM))
        return self._counted(found)

    def fine_tuned(self, name: str, models: Sequence[LanguageModel]) -> tuple[Float64, float]:
        """Returns what fine-tuned models come to, and the learning rate.

        Args:
            name: of what is trained, for messages.
            models: one for each seed; they stay as they are.

        Raises:
            CheckpointError: it diverges.
        """
        learning = self.task.learning
        learned, judged = parted(self.train, DEVELOPMENT)

        def quality(rate: float) -> float:
            found = self._classified(models[0], learned, judged, rate, learning.seeds[0])
            if found is None:
                return float("nan")
            counts = confusion([""] * len(found), [""], labels_of(judged), found, self.classes)
            return float(MEASURES[self.task.metric](counts[0]))

        rate = best_rate(name, learning, quality)
        found = []
        for model, seed in zip(models, learning.seeds, strict=True):
            classes = self._classified(model, self.train, self.test, rate, seed)
            if classes is None:
                raise diverged(name, [rate])
            found.append(classes)
        return self._counted(found), rate

    def _classified(
        self, model: LanguageModel, train: Sequence[Passage], test: Sequence[Passage], rate: float, seed: int
    ) -> Int64 | None:
        """The classes that a copy of the model finds after a training; None if that diverges.

        The model stays in evaluation mode, in which it has no noise, and its balancers do not move.
        """
        model = copy.deepcopy(model).eval()
        generator = torch.Generator().manual_seed(seed)
        head = nn.Linear(model.config.hidden_size, self.classes, device=self.readings.device)
        head.weight.data.copy_(_HEAD_DEVIATION * torch.randn(head.weight.shape, generator=generator))
        head.bias.data.zero_()

        def logits(batch: LabelledBatch) -> Tensor:
            scores: Tensor = head(batch.states(model.encode(batch.context)))
            return scores

        def loss_of(passages: list[Passage]) -> Tensor:
            batch = self._batch(passages)
            return F.cross_entropy(logits(batch), batch.labels_X)

        parameters = [*model.parameters(), *head.parameters()]
        if not fine_tune(parameters, loss_of, train, self.task.learning, rate, seed):
            return None
        with torch.no_grad():
            parts = batches(test, self.task.learning.batch_size)
            return np.concatenate([logits(self._batch(part)).argmax(dim=-1).cpu().numpy() for part in parts])

    @torch.no_grad()
    def _states(self, encode: Encode, passages: Sequence[Passage]) -> npt.NDArray[np.float32]:
        parts = map(self._batch, batches(passages, self.task.learning.batch_size))
        return np.concatenate([batch.states(encode(batch.context)).float().cpu().numpy() for batch in parts])

    def _batch(self, passages: Sequence[Passage]) -> LabelledBatch:
        return LabelledBatch.of(passages, self.task.kind, self.readings)

    def _counted(self, found: Sequence[Int64]) -> Float64:
        documents = [passage.document for passage in self.test for _ in passage.labels]
        names, truth = list(dict.fromkeys(documents)), labels_of(self.test)
        return np.stack([confusion(documents, names, truth, classes, self.classes) for classes in found])
