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

_TOKENS_AT_ONCE = 1 << 16
"""Most tokens that are sampled in one call, if a micro-batch has no more."""


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
        self._at_once = max(1, _TOKENS_AT_ONCE // (self._size * config.data.sequence_length))

    def of_step(self, step: int) -> Iterator[tuple[RoutingContext, Tensor]]:
        """Yields context and targets of each micro-batch of a step."""
        starts = [(number * self._ranks.size + self._ranks.rank) * self._size for number in range(self.accumulation)]
        for first in range(0, self.accumulation, self._at_once):
            together = starts[first : first + self._at_once]
            batch = self._sampler.rows(step, np.add.outer(together, np.arange(self._size)).reshape(-1))
            for number, start in enumerate(together):
                # Whatever draws from torch's generator is a function of the position too, and so the same after a
                # restart.
                _seed(((self._seed << 40) + step * self._global_size + start) % 2**63, self._ranks.device)
                rows_B = slice(number * self._size, (number + 1) * self._size)
                yield to_context(batch, rows_B, step, self._ranks.device)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds what a model on this device draws from. `torch.manual_seed` also takes a trace of its caller, for each GPU
    that may be used later, which takes longer than drawing does."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
