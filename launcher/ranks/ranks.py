"""The processes of a training."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


def is_first_rank() -> bool:
    """Tells whether this process is, or will be, rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Tells whether there is, or will be, only one rank."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank, size: number of this process, number of processes.
        device: where it computes.
        group: all processes; None if there is only one, so that formulas skip their collectives.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    def seed(self, seed: int) -> None:
        """Seeds what a model on this device draws from. `torch.manual_seed` would also note for every GPU that may be
        used later who has called it, which takes longer."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)


def mean_over_ranks(values: dict[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """Returns the mean of each value, a tensor without dimensions."""
    means = torch.stack([value.float() for value in values.values()])
    if ranks.group is not None:
        dist.all_reduce(means, group=ranks.group)
        means /= ranks.size
    return dict(zip(values, means.tolist(), strict=True))
