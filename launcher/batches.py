"""From the data's batches to the model's inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_testbed.data.sampler import Batch
from moe_testbed.routing.records import RoutingContext


def to_context(
    batch: Batch, rows_B: npt.NDArray[Any] | slice, step: int, device: torch.device
) -> tuple[RoutingContext, Tensor]:
    """Context and targets (next token ids, int64 [B, L]) of some rows of a batch, on the device."""

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
