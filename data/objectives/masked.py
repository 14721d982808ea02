"""Masked language modelling (Devlin et al., arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field, model_validator

from moe_testbed.data.objectives.base import (
    ENCODER,
    NO_TARGET,
    Objective,
    Reading,
    SpecialIds,
    Task,
    keys_of,
    objective_names,
    uniform,
)
from moe_testbed.data.tokens.sampler import Batch

_PLACES, _REPLACEMENTS, _PIECES = 1, 2, 3


@objective_names.register("masked")
class Masked(Objective):
    """Predicts tokens of which a share is hidden: of the chosen places most are masked, some get a piece at random, and
    the others keep their own.

    Every sequence has as many chosen places, so that every place counts alike, however the batch is shared among ranks.
    """

    name: str = "masked"
    architecture: ClassVar[str] = "encoder"
    rate: float = Field(0.3, gt=0, lt=1, description="share of the tokens that are to be predicted")
    masked: float = Field(0.8, ge=0, le=1, description="share of these in whose place the mask is read")
    random: float = Field(0.1, ge=0, le=1, description="share of these in whose place a random piece is read")

    @model_validator(mode="after")
    def _shares_fit(self) -> Masked:
        if self.masked + self.random > 1 + 1e-9:
            raise ValueError(
                f"objective.masked is {self.masked:g} and objective.random {self.random:g}, more than 1 together; what "
                "is left of 1 keeps its own token"
            )
        return self

    def apply(self, batch: Batch, stream: Sequence[int], ids: SpecialIds) -> Task:
        tokens_BL = batch.token_ids_BL
        B, L = tokens_BL.shape
        order_BL = np.argsort(uniform(keys_of(stream, batch, _PLACES), L), axis=1, kind="stable")
        chosen_BL = np.zeros((B, L), dtype=np.bool_)
        np.put_along_axis(chosen_BL, order_BL[:, : self._count(L)], True, axis=1)
        draw_BL = uniform(keys_of(stream, batch, _REPLACEMENTS), L)
        piece_BL = (uniform(keys_of(stream, batch, _PIECES), L) * ids.pieces).astype(np.int64)
        replaced_BL = np.where(draw_BL < self.masked + self.random, piece_BL, tokens_BL)
        replaced_BL = np.where(draw_BL < self.masked, ids.mask, replaced_BL)
        read_BL = np.where(chosen_BL, replaced_BL, tokens_BL)
        source_BL = np.broadcast_to(np.arange(L), (B, L))
        return Task({ENCODER: Reading(read_BL, source_BL)}, np.where(chosen_BL, tokens_BL, NO_TARGET))

    def lengths(self, sequence_length: int) -> dict[str, int]:
        return {ENCODER: sequence_length}

    def mean_targets(self, sequence_length: int) -> float:
        return float(self._count(sequence_length))

    def _count(self, sequence_length: int) -> int:
        return max(1, round(self.rate * sequence_length))
