"""Language modelling: the next token from those before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from moe_testbed.data.objectives.base import DECODER, Objective, Reading, SpecialIds, Task, objective_names
from moe_testbed.data.tokens.sampler import Batch


@objective_names.register("next_token")
class NextToken(Objective):
    """Predicts the next token at every place."""

    name: str = "next_token"
    architecture: ClassVar[str] = "causal"
    all_ids_are_targets: ClassVar[bool] = True

    def apply(self, batch: Batch, stream: Sequence[int], ids: SpecialIds) -> Task:
        source_BL = np.broadcast_to(np.arange(batch.token_ids_BL.shape[1]), batch.token_ids_BL.shape)
        return Task({DECODER: Reading(batch.token_ids_BL, source_BL)}, batch.targets_BL)

    def lengths(self, sequence_length: int) -> dict[str, int]:
        return {DECODER: sequence_length}
