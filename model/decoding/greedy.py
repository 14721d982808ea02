"""Greedy decoding: at each place the token with the highest logit.

Shape legend: B sequences, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_testbed.model.config import DECODER
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import UNLABELLED, RoutingContext


def unlabelled(
    token_ids_BL: Tensor, valid_BL: Tensor | None = None, encoder: RoutingContext | None = None
) -> RoutingContext:
    """The context of texts of which nothing is known but their tokens.

    Args:
        valid_BL: False for padding, bool; None where there is none.
        encoder: the same of the texts that an encoder reads.
    """
    B, L = token_ids_BL.shape
    device = token_ids_BL.device
    return RoutingContext(
        token_ids_BL=token_ids_BL,
        domain_BL=torch.full_like(token_ids_BL, UNLABELLED),
        document_BL=None,
        position_BL=torch.arange(L, device=device).expand(B, L),
        sequence_B=torch.arange(B, device=device),
        valid_BL=valid_BL,
        encoder=encoder,
    )


@torch.no_grad()
def write_greedily(
    model: LanguageModel,
    begun_BL: Tensor,
    length: int,
    end: int | None = None,
    padding: int = 0,
    read: RoutingContext | None = None,
) -> Tensor:
    """Continues texts, each token with the highest logit.

    An encoder reads once. The decoder runs over all that is written so far for every token: it keeps nothing, so that a
    text of L tokens takes L passes of up to L tokens.

    Args:
        model: with a decoder, in evaluation mode; its routers read no labels.
        begun_BL: beginnings of equal length, without padding; of a decoder beside an encoder, the start id.
        length: tokens of the longest text that is returned, its beginning included.
        end: the id that ends a text; None: none does.
        padding: the id that stands behind it.
        read: what the encoder reads; None for a causal model.

    Returns:
        The texts with their beginnings, int64 [B, at most length].

    Raises:
        ValueError: the model has no decoder, or none of its positions is as late as ``length``.
    """
    if DECODER not in model.stacks:
        raise ValueError("an encoder writes no text; use a model with a decoder")
    if length > (most := model.stacks[DECODER].positions.length):
        raise ValueError(f"a text of {length} tokens is to be written, but the decoder has {most} positions")
    memory = None if read is None else model.memory(read)
    written_BL, ended_B = begun_BL, torch.zeros(len(begun_BL), dtype=torch.bool, device=begun_BL.device)
    while written_BL.shape[1] < length and not bool(ended_B.all()):
        next_B = model.next_logits(unlabelled(written_BL), memory).argmax(-1).masked_fill(ended_B, padding)
        written_BL = torch.cat([written_BL, next_B[:, None]], dim=1)
        if end is not None:
            ended_B = ended_B | (next_B == end)
    return written_BL
