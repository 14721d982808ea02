"""Floating point operations of a model's matrix products, counted from the model itself.

Shape legend: L positions of a sequence, X those of what an encoder reads of it, M model width.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_testbed.data.objectives import Objective
from moe_testbed.model.config import ENCODER
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.stack import Block, Stack

_TRAINED, _FROZEN, _ONE_WAY = 3, 1, 2
"""Passes of a product: forward, and backward to its input and to its weights, or to one of them."""


class StepFlops:
    """What one optimizer step takes, on all ranks together.

    Args:
        model: may hold its rank's experts alone.
        sequence_length: tokens of a sequence of the text.
        sequences: those of a step.

    Attributes:
        tokens: those of the text of a step.
    """

    def __init__(self, model: LanguageModel, objective: Objective, sequence_length: int, sequences: int) -> None:
        self._model, self._sequences = model, sequences
        self._lengths = objective.lengths(sequence_length)
        self._known: dict[frozenset[str], Mapping[str, int]] = {}
        self.tokens = sequences * sequence_length

    def stacks(self, frozen: frozenset[str] = frozenset()) -> Mapping[str, int]:
        """Returns the FLOPs of each stack by name, while these parts are frozen."""
        if frozen not in self._known:
            of_encoder = self._lengths.get(ENCODER, 0)
            self._known[frozen] = {
                name: self._sequences * stack_flops(stack, self._lengths[name], of_encoder, frozen)
                for name, stack in self._model.stacks.items()
            }
        return self._known[frozen]

    def output(self, frozen: frozenset[str], targets: int) -> int:
        """Returns the FLOPs of the output layer for so many targets."""
        passes = _ONE_WAY if self._tables_are_shared and ENCODER in frozen else _TRAINED
        return passes * 2 * targets * self._model.output_rows * self._model.config.hidden_size

    @property
    def _tables_are_shared(self) -> bool:
        return self._model.config.embeddings == "shared"


def stack_flops(stack: Stack, length: int, encoder_length: int, frozen: frozenset[str]) -> int:
    """Returns the FLOPs of one sequence in a stack, forward and, unless it is frozen, backward.

    Every weight of a product takes two operations a token; scores and mixing take ``4 L^2 M``, half of that in a causal
    layer, which needs one half of them, and ``4 L X M`` in cross-attention, whose keys and values are computed of the
    encoder's X tokens. Backward, each product takes twice as much, but half of that where its input needs no gradient,
    as keys and values of a frozen encoder.

    Args:
        length: L.
        encoder_length: X.
        frozen: the parts that are still.
    """
    passes = _FROZEN if stack.name in frozen else _TRAINED
    flops = 0
    for block in stack.layers:
        own, memory = block_weights(block)
        flops += passes * 2 * length * own
        flops += passes * (2 if block.attention.causal else 4) * length**2 * stack.config.hidden_size
        if block.cross_attention is not None:
            of_memory = _ONE_WAY if passes == _TRAINED and ENCODER in frozen else passes
            flops += of_memory * 2 * encoder_length * memory
            flops += passes * 4 * length * encoder_length * stack.config.hidden_size
    return flops


def block_weights(block: Block) -> tuple[int, int]:
    """Returns how many weights a token's products use in a block, those of keys and values of an encoder's tokens
    apart. Of the experts that a rank holds, as many count as a token chooses."""
    weights = sum(parameter.numel() for parameter in block.parameters() if parameter.ndim > 1)
    memory = 0 if block.cross_attention is None else block.cross_attention.key_value.weight.numel()
    if block.moe is not None:
        held = block.moe.experts.num_experts
        expert = sum(parameter.numel() for parameter in block.moe.experts.parameters()) // held
        weights += (block.moe.choices - held) * expert
    return weights - memory, memory
