"""From the data's batches to the model's inputs.

Shape legend: B sequences, L positions, X those that a stack reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.objectives import NextToken, Objective, SpecialIds
from moe_testbed.data.tokens.sampler import Batch, Sampler
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.sharing import accumulation_steps
from moe_testbed.routing.records import RoutingContext

_TRAINING, _EVALUATION = 1, 2


def build_sampler(config: ExperimentConfig, store: Store) -> Sampler:
    """Returns the sampler of the training batches."""
    return Sampler(
        store,
        split="train",
        sequence_length=config.data.sequence_length,
        batch_size=config.training.global_batch_size,
        seed=config.seed,
        packing=config.data.packing,
        pieces_per_sequence=config.data.pieces_per_sequence,
        domain_weights=config.data.mix.domain_weights(),
    )


@dataclass(frozen=True)
class ModelInput:
    """What a model is given.

    Attributes:
        context: of what the last stack reads; with an encoder in front, its context is in it.
        targets_BL: ids of the tokens that are to be predicted, int64, `NO_TARGET` where nothing is.
        kinds_BL: number of each target's kind, int64; None where there is one kind.
    """

    context: RoutingContext
    targets_BL: Tensor
    kinds_BL: Tensor | None

    @property
    def arguments(self) -> tuple[RoutingContext, Tensor]:
        """What the model is called with."""
        return self.context, self.targets_BL


@dataclass(frozen=True)
class InputMaker:
    """Makes a model's inputs of text.

    Args:
        stream: what the objective's draws depend on besides the numbers of the sequences.
    """

    objective: Objective
    ids: SpecialIds
    stream: tuple[int, ...]

    @classmethod
    def for_training(cls, config: ExperimentConfig, store: Store) -> InputMaker:
        """Returns one whose draws are those of a training's seed."""
        return cls(config.objective, special_ids(config, store.vocab_size), (_TRAINING, config.seed))

    @classmethod
    def for_evaluation(cls, config: ExperimentConfig, store: Store) -> InputMaker:
        """Returns one whose draws are the same for all runs with the same objective."""
        return cls(config.objective, special_ids(config, store.vocab_size), (_EVALUATION,))

    def rows(self, vocab_size: int) -> int:
        """Returns how many token ids there are, with those that stand for no text."""
        return vocab_size if self.objective.all_ids_are_targets else self.ids.rows

    def __call__(self, batch: Batch, rows_B: npt.NDArray[Any] | slice, step: int, device: torch.device) -> ModelInput:
        """Returns the input of some rows of a batch, on the device."""

        def move(array: npt.NDArray[Any]) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

        part = Batch(**{name: values[rows_B] for name, values in vars(batch).items()})
        task = self.objective.apply(part, self.stream, self.ids)
        context: RoutingContext | None = None
        for reading in task.readings.values():
            context = RoutingContext(
                token_ids_BL=move(reading.token_ids_BX),
                domain_BL=move(np.take_along_axis(part.domain_BL, reading.source_BX, axis=1)),
                document_BL=move(np.take_along_axis(part.document_BL, reading.source_BX, axis=1)),
                position_BL=move(np.tile(np.arange(reading.token_ids_BX.shape[1]), (len(part.sequence_B), 1))),
                sequence_B=move(part.sequence_B),
                step=step,
                valid_BL=None if reading.valid_BX is None else move(reading.valid_BX),
                encoder=context,
            )
        assert context is not None, "an objective gives a stack something to read"
        return ModelInput(context, move(task.targets_BX), None if task.kinds_BX is None else move(task.kinds_BX))


LANGUAGE_MODELLING = InputMaker(NextToken(), SpecialIds(0), ())


class MicroBatches:
    """The micro-batches of one rank, which are functions of the step alone.

    Args:
        config: the experiment as the ranks share it, see `shared_among`.

    Attributes:
        accumulation: micro-batches of this rank in one optimizer step.
        tokens_per_step: tokens of all ranks in one optimizer step.
    """

    def __init__(self, config: ExperimentConfig, store: Store, ranks: Ranks) -> None:
        self._seed, self._ranks = config.seed, ranks
        self._sampler, self._size = build_sampler(config, store), config.training.micro_batch_size
        self._global_size = config.training.global_batch_size
        self._make = InputMaker.for_training(config, store)
        self.accumulation = accumulation_steps(config, ranks.size)
        self.tokens_per_step = self._global_size * config.data.sequence_length

    def of_step(self, step: int) -> Iterator[tuple[RoutingContext, Tensor]]:
        """Yields context and targets of each micro-batch of a step."""
        size = self._size
        starts = [(number * self._ranks.size + self._ranks.rank) * size for number in range(self.accumulation)]
        batch = self._sampler.rows(step, np.add.outer(starts, np.arange(size)).reshape(-1))
        for number, start in enumerate(starts):
            # Whatever draws from torch's generator is a function of the position too, and so the same after a restart.
            self._ranks.seed(((self._seed << 40) + step * self._global_size + start) % 2**63)
            yield self._make(batch, slice(number * size, (number + 1) * size), step, self._ranks.device).arguments
