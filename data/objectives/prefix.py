"""Prefix language modelling: a decoder continues the text that the encoder reads (Raffel et al., arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from moe_testbed.data.objectives.base import (
    DECODER,
    ENCODER,
    Objective,
    Reading,
    SpecialIds,
    Task,
    keys_of,
    objective_names,
    padded,
    shifted,
    uniform,
)
from moe_testbed.data.tokens.sampler import Batch

_CUT = 21


@objective_names.register("prefix")
class Prefix(Objective):
    """The encoder reads a sequence up to a place that is drawn evenly, and the decoder writes the rest."""

    name: str = "prefix"
    architecture: ClassVar[str] = "encoder_decoder"
    shortest_share: float = Field(0.25, gt=0, le=0.5, description="either part is at least this share of the sequence")

    def apply(self, batch: Batch, stream: Sequence[int], ids: SpecialIds) -> Task:
        tokens_BL = batch.token_ids_BL
        L = tokens_BL.shape[1]
        least, longest = self.shortest(L), self.lengths(L)[ENCODER]
        draw_B = uniform(keys_of(stream, batch, _CUT), 1)[:, 0]
        cut_B = least + (draw_B * (L - 2 * least + 1)).astype(np.int64)
        place_L = np.arange(L)
        encoder = padded([(row[:cut], place_L[:cut]) for row, cut in zip(tokens_BL, cut_B, strict=True)], longest)
        rest = padded([(row[cut:], place_L[cut:]) for row, cut in zip(tokens_BL, cut_B, strict=True)], longest)
        before_BX = shifted(rest.source_BX, 0)
        before_BX[:, 0] = rest.source_BX[:, 0]
        decoder = Reading(shifted(rest.token_ids_BX, ids.start), before_BX, rest.valid_BX)
        return Task({ENCODER: encoder, DECODER: decoder}, rest.targets_BX)

    def lengths(self, sequence_length: int) -> dict[str, int]:
        longest = sequence_length - self.shortest(sequence_length)
        return {ENCODER: longest, DECODER: longest}

    def mean_targets(self, sequence_length: int) -> float:
        return sequence_length / 2

    def shortest(self, sequence_length: int) -> int:
        return max(1, int(self.shortest_share * sequence_length))
