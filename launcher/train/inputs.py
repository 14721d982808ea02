"""From the data's batches to the model's inputs.

Shape legend: B sequences, L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.tokens.sampler import Batch, Sampler
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.sharing import accumulation_steps
from moe_testbed.routing.records import RoutingContext


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


def to_context(
    batch: Batch, rows_B: npt.NDArray[Any] | slice, step: int, device: torch.device
) -> tuple[RoutingContext, Tensor]:
    """Returns context and targets (next token ids, int64 [B, L]) of some rows of a batch, on the device."""

    def move(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array[rows_B])).to(device, non_blocking=True)

    context = RoutingContext(
        token_ids_BL=move(batch.token_ids_BL),
        domain_BL=move(batch.domain_BL),
        document_BL=move(batch.document_BL),
        position_BL=move(batch.position_BL),
        sequence_B=move(batch.sequence_B),
        step=step,
    )
    return context, move(batch.targets_BL)


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
            yield to_context(batch, slice(number * size, (number + 1) * size), step, self._ranks.device)
