"""What a forward pass keeps for the backward pass, and what that needs beside, in bytes.

Counted tensor by tensor on a CPU, where each norm keeps its normalised input; a GPU's norm keeps its input. What
routers and balancers keep beyond scores, choices and weights is left out: it is little beside the hidden states.

These are formulas, where the weights are counted from a model on the meta device, because that cannot run forward: the
sizes in dispatch depend on the choices (`bincount` has no meta kernel), and routers leave autocast, which knows no meta
device. The tests compare with counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.model.output_layer import tokens_per_block
from moe_testbed.routing.router import Capability

_FLOAT, _INDEX = 4, 8


@dataclass(frozen=True)
class Activations:
    """The bytes of one micro-batch on one rank.

    Attributes:
        blocks: what each block keeps, what its caller keeps of it included.
        kept_of_blocks: what remains of each where it is recomputed: its input and the routing decision.
        head: final norm and loss, of which the gradients are computed with it.
        loss_blocks: what the loss takes beside, for the logits of one block of tokens and their gradients.
        block_gradients: what the backward pass of a block takes more than it frees.
    """

    blocks: tuple[int, ...]
    kept_of_blocks: tuple[int, ...]
    head: int
    loss_blocks: int
    block_gradients: int

    def held(self, checkpointing: bool) -> int:
        """What is held between forward and backward pass, with activation checkpointing or without."""
        return sum(self.kept_of_blocks if checkpointing else self.blocks) + self.head

    def peak(self, checkpointing: bool) -> int:
        """The most that is held: while the loss is computed, or in the last block's backward pass, recomputed or
        not."""
        blocks = sum(self.kept_of_blocks) + max(self.blocks) if checkpointing else sum(self.blocks)
        return max(self.held(checkpointing) + self.loss_blocks, blocks + self.block_gradients)


def planned_activations(
    config: ExperimentConfig, micro_batch_size: int, element_size: int, accelerator: Literal["cuda", "cpu"]
) -> Activations:
    """Returns the activations of a training.

    Where experts are spread over ranks, every rank is taken to get equally many tokens.

    Args:
        micro_batch_size: sequences that a rank computes at once.
        element_size: bytes of a number in the model's precision.
        accelerator: decides how many tokens' logits are computed at once.
    """
    model, tokens, vocab_size = config.model, micro_batch_size * config.data.sequence_length, config.data.mix.vocab_size
    width = model.hidden_size * element_size
    # Normalised input in float32, and the factor of each token. What comes out is kept by who reads it.
    norm = _FLOAT * (model.hidden_size + 1)
    # Input; queries, keys and values in their places; output and its logarithmic sums.
    attention = norm + 5 * width + _FLOAT * model.num_heads
    # The weight of queries, keys and values in the order in which they are turned.
    ordered_weight = 3 * model.hidden_size * width
    layers, blocks, kept_of_blocks = range(model.num_layers), [], []
    decided = False
    for layer in layers:
        of_token, kept, experts = attention + norm, 0, 0
        if model.is_moe_layer(layer):
            decides = not decided or config.routing.depth == "layer_wise"
            decided = True
            experts, outputs = _experts(config, tokens, element_size)
            kept = outputs + (_decision(config) if decides else model.moe.choices)
            of_token += kept + (_scoring(config) if decides else 0)
            if hidden := model.moe.num_shared_experts * model.moe.expert_size:
                # A copy of the input in float32 is none where the model's precision is float32.
                copied = decides and element_size != _FLOAT
                of_token += _feed_forward(hidden, element_size) + (width if copied or not decides else 0)
        else:
            of_token += width + _feed_forward(model.dense_size(layer), element_size)
        blocks.append(tokens * of_token + experts + ordered_weight)
        kept_of_blocks.append(tokens * (width + kept))
    # The last hidden states and their gradient; token ids, as inputs and as targets; loss and share of each token.
    head = tokens * (norm + 2 * width + 2 * _INDEX + 2 * _FLOAT) + vocab_size * width
    loss_blocks = _loss_blocks(config, tokens, element_size, accelerator)
    block_gradients = tokens * width + max(_gradients(config, layer, tokens, element_size) for layer in layers)
    return Activations(tuple(blocks), tuple(kept_of_blocks), head, loss_blocks, block_gradients)


def _loss_blocks(config: ExperimentConfig, tokens: int, element_size: int, accelerator: Literal["cuda", "cpu"]) -> int:
    """Bytes that the loss takes beside its results: the weight once more, and one block's logits and their gradients.

    In other precisions than float32, in which the softmax is computed, block and weight gradient are there twice.
    """
    vocab_size = config.data.mix.vocab_size
    logits = vocab_size * min(tokens, tokens_per_block(vocab_size, accelerator))
    weight = vocab_size * config.model.hidden_size
    if element_size == _FLOAT:
        return _FLOAT * (logits + weight)
    # The block before is freed when the softmax of the next one is at hand.
    return logits * (2 * _FLOAT + 2 * element_size) + weight * (_FLOAT + element_size)


def _decision(config: ExperimentConfig) -> int:
    """Bytes that the caller keeps of each token: choices, their weights, which arrived, logits and probabilities."""
    moe = config.model.moe
    scores = 2 * _FLOAT * moe.num_routed_experts if _scores(config) else 0
    return scores + moe.choices * (_INDEX + _FLOAT + 1)


def _scoring(config: ExperimentConfig) -> int:
    """Bytes that the router keeps of each token, too: its input in float32, the chosen scores and their sum."""
    return _FLOAT * (config.model.hidden_size + config.model.moe.choices + 2) if _scores(config) else 0


def _scores(config: ExperimentConfig) -> bool:
    return Capability.SCORES in config.routing.router.provides


def _feed_forward(hidden: int, element_size: int) -> int:
    """Bytes that a feed-forward layer keeps of each token: projections, the activation of one, and their product."""
    return 4 * hidden * element_size


def _experts(config: ExperimentConfig, tokens: int, element_size: int) -> tuple[int, int]:
    """The bytes that the experts keep for all tokens, and those that the caller keeps of each token's outputs."""
    moe, width = config.model.moe, config.model.hidden_size * element_size
    hidden = moe.expert_size * element_size
    if moe.dispatch == "capacity":
        slots = moe.num_ffn_experts * moe.expert_capacity(tokens)
        # Per slot: its token, the input, and a feed-forward layer. Per choice: its slot, its output, and its weight.
        of_slots = slots * (_INDEX + width + _feed_forward(moe.expert_size, element_size))
        return of_slots + tokens * moe.choices * (_INDEX + width), 0
    rows = sent_rows(config, tokens)
    # Input, both projections and their product; the weight.
    of_rows = rows * (width + 3 * hidden + _FLOAT)
    # Where every row came from, and where it went: by choice, by token, by expert.
    of_rows += _INDEX * (2 * rows + tokens * moe.choices)
    if config.parallel.expert_parallel_size > 1:
        # Order of arrival, and its inverse.
        of_rows += 2 * _INDEX * rows
    keeps_outputs = any(balancer.needs_outputs for balancer in config.routing.balance.values())
    outputs = moe.choices * width if keeps_outputs else 0
    return of_rows + tokens * outputs, outputs


def _gradients(config: ExperimentConfig, layer: int, tokens: int, element_size: int) -> int:
    """The bytes of a layer's feed-forward gradients: those of its product and both projections, and what computing them
    takes in between (in float32 where rows are weighted), less the product itself, which is freed."""
    moe = config.model.moe
    if not config.model.is_moe_layer(layer):
        return tokens * 3 * config.model.dense_size(layer) * element_size
    if moe.dispatch == "capacity":
        # Gradients of both projections, once apart and once side by side, less what is freed.
        return moe.num_ffn_experts * moe.expert_capacity(tokens) * moe.expert_size * 2 * element_size
    in_between = _FLOAT if element_size == _FLOAT else 3 * _FLOAT
    return sent_rows(config, tokens) * moe.expert_size * (3 * element_size + in_between)


def sent_rows(config: ExperimentConfig, tokens: int) -> int:
    """Assignments of some tokens to experts with a feed-forward layer, if all experts are used alike."""
    moe = config.model.moe
    return round(tokens * moe.choices * moe.num_ffn_experts / moe.num_routed_experts)
