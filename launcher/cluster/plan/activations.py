"""What a forward pass keeps for the backward pass, and what that needs beside, in bytes.

Counted tensor by tensor on a CPU, where each norm keeps its normalised input; a GPU's norm keeps its input. What
routers and balancers keep beyond scores, choices and weights is left out: it is little beside the hidden states. Of a
part that is frozen for a while the plan is that of the steps after that, in which it keeps as much as any other.

These are formulas, where the weights are counted from a model on the meta device, because that cannot run forward: the
sizes in dispatch depend on the choices (`bincount` has no meta kernel), and routers leave autocast, which knows no meta
device. The tests compare with counted bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_testbed.launcher.cluster.plan.stacks import PlannedStack, planned_stacks
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.model.output_layer import tokens_per_block
from moe_testbed.routing.router import Capability

_FLOAT, _INDEX = 4, 8


@dataclass(frozen=True)
class StackActivations:
    """The bytes of one stack.

    Attributes:
        blocks: what each block keeps, what its caller keeps of it included.
        kept_of_blocks: what remains of each where it is recomputed: its input and the routing decision.
        output: what is kept behind the blocks for the stack that reads this one: final norm and hidden states.
        block_gradients: what the backward pass of a block takes more than it frees.
    """

    blocks: tuple[int, ...]
    kept_of_blocks: tuple[int, ...]
    output: int
    block_gradients: int

    def held(self, checkpointing: bool) -> int:
        """What is held once the stack has run forward."""
        return sum(self.kept_of_blocks if checkpointing else self.blocks) + self.output

    def backward_peak(self, checkpointing: bool) -> int:
        """The most that is held of this stack in its last block's backward pass, recomputed or not."""
        blocks = sum(self.kept_of_blocks) + max(self.blocks) if checkpointing else sum(self.blocks)
        return blocks + self.block_gradients


@dataclass(frozen=True)
class Activations:
    """The bytes of one micro-batch on one rank.

    Attributes:
        stacks: those of the stacks, from the input to the output.
        head: final norm and loss, of which the gradients are computed with it.
        loss_blocks: what the loss takes beside, for the logits of one block of tokens and their gradients.
    """

    stacks: tuple[StackActivations, ...]
    head: int
    loss_blocks: int

    def held(self, checkpointing: bool) -> int:
        """What is held between forward and backward pass, with activation checkpointing or without."""
        return sum(stack.held(checkpointing) for stack in self.stacks) + self.head

    def peak(self, checkpointing: bool) -> int:
        """The most that is held: while the loss is computed, or in the backward pass of a stack, in which those in
        front of it are still held."""
        found = [self.held(checkpointing) + self.loss_blocks]
        in_front = 0
        for stack in self.stacks:
            found.append(in_front + stack.backward_peak(checkpointing))
            in_front += stack.held(checkpointing)
        return max(found)


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
    *in_front, last = planned_stacks(config, micro_batch_size)
    is_spread = config.parallel.expert_parallel_size > 1
    width = config.model.hidden_size * element_size
    stacks = [
        *(_stack(stack, element_size, is_spread, _output(stack, element_size)) for stack in in_front),
        _stack(last, element_size, is_spread, 0),
    ]
    norm = _norm(last)
    if config.objective.all_ids_are_targets:
        rows = config.data.mix.vocab_size
        # The last hidden states and their gradient; token ids, as inputs and as targets; loss and share of each token.
        head = last.tokens * (norm + 2 * width + 2 * _INDEX + 2 * _FLOAT) + rows * width
        return Activations(tuple(stacks), head, _loss_blocks(rows, last, last.tokens, element_size, accelerator))
    ids = special_ids(config, config.data.mix.vocab_size)
    rows, read = config.objective.targets(ids).stop, sum(stack.tokens for stack in (*in_front, last))
    targets = round(micro_batch_size * config.objective.mean_targets(config.data.sequence_length))
    # Of what is read: its ids; for routers also domain, document and place. Of the last stack: final norm, loss, and
    # whether the target comes first. Of each target: its hidden states and their gradient; its id and its place; its
    # loss and its share.
    known = 4 * _INDEX if config.model.num_moe_layers else _INDEX
    head = read * known + last.tokens * (norm + _FLOAT + 1)
    head += targets * (2 * width + 2 * _INDEX + 2 * _FLOAT) + rows * width
    # All hidden states are there until the loss is at hand.
    loss_blocks = last.tokens * width + _loss_blocks(rows, last, targets, element_size, accelerator)
    return Activations(tuple(stacks), head, loss_blocks)


def _stack(stack: PlannedStack, element_size: int, is_spread: bool, output: int) -> StackActivations:
    """Returns the activations of a stack, of which so many bytes are kept behind its blocks.

    Args:
        is_spread: its experts are spread over several ranks.
    """
    model, tokens, width = stack.model, stack.tokens, stack.model.hidden_size * element_size
    norm = _norm(stack)
    attention, of_all = _attention(stack, element_size)
    layers, blocks, kept_of_blocks = range(model.num_layers), [], []
    decided = False
    for layer in layers:
        of_token, kept, experts = attention + norm, 0, 0
        if model.is_moe_layer(layer):
            decides = not decided or stack.routing.depth == "layer_wise"
            decided = True
            experts, outputs = _experts(stack, element_size, is_spread)
            kept = outputs + (_decision(stack) if decides else model.moe.choices)
            of_token += kept + (_scoring(stack) if decides else 0)
            if hidden := model.moe.num_shared_experts * model.moe.expert_size:
                # A copy of the input in float32 is none where the model's precision is float32.
                copied = decides and element_size != _FLOAT
                of_token += _feed_forward(hidden, element_size) + (width if copied or not decides else 0)
        else:
            of_token += width + _feed_forward(model.dense_size(layer), element_size)
        if stack.is_still:
            # Nothing for a backward pass, but what its caller keeps.
            blocks.append(tokens * kept)
            kept_of_blocks.append(tokens * kept)
            continue
        blocks.append(tokens * of_token + experts + of_all)
        kept_of_blocks.append(tokens * (width + kept))
    if stack.is_still:
        return StackActivations(tuple(blocks), tuple(kept_of_blocks), output, 0)
    block_gradients = tokens * width + max(_gradients(stack, layer, element_size) for layer in layers)
    return StackActivations(tuple(blocks), tuple(kept_of_blocks), output, block_gradients)


def _norm(stack: PlannedStack) -> int:
    """Bytes that a norm keeps of each token: the normalised input in float32, and the factor. What comes out is kept by
    who reads it."""
    return _FLOAT * (stack.model.hidden_size + 1)


def _attention(stack: PlannedStack, element_size: int) -> tuple[int, int]:
    """Bytes that a block's attention keeps of each token of its stack, and of all tokens together. Masks of padding are
    left out: they are a number a token."""
    model, width = stack.model, stack.model.hidden_size * element_size
    # Input; queries, keys and values in their places; output and its logarithmic sums.
    of_token = _norm(stack) + 5 * width + _FLOAT * model.num_heads
    # The weight of queries, keys and values in the order in which they are turned.
    ordered_weight = 3 * model.hidden_size * width
    if not stack.memory_tokens:
        return of_token, ordered_weight
    # The same once more, but keys and values of the encoder's tokens, whose hidden states are kept but once.
    of_token += _norm(stack) + 3 * width + _FLOAT * model.num_heads
    return of_token, 2 * ordered_weight + stack.memory_tokens * 2 * width


def _output(stack: PlannedStack, element_size: int) -> int:
    """Bytes that are kept behind a stack for the one that reads it."""
    return stack.tokens * (stack.model.hidden_size * element_size + (0 if stack.is_still else _norm(stack)))


def _loss_blocks(
    rows: int, last: PlannedStack, targets: int, element_size: int, accelerator: Literal["cuda", "cpu"]
) -> int:
    """Bytes that the loss takes beside its results: the weight once more, and one block's logits and their gradients.

    In other precisions than float32, in which the softmax is computed, block and weight gradient are there twice.

    Args:
        rows: how many token ids can be a target.
    """
    logits = rows * min(targets, tokens_per_block(rows, accelerator))
    weight = rows * last.model.hidden_size
    if element_size == _FLOAT:
        return _FLOAT * (logits + weight)
    # The block before is freed when the softmax of the next one is at hand.
    return logits * (2 * _FLOAT + 2 * element_size) + weight * (_FLOAT + element_size)


def _decision(stack: PlannedStack) -> int:
    """Bytes that the caller keeps of each token: choices, their weights, which arrived, logits and probabilities."""
    moe = stack.model.moe
    scores = 2 * _FLOAT * moe.num_routed_experts if _scores(stack) else 0
    return scores + moe.choices * (_INDEX + _FLOAT + 1)


def _scoring(stack: PlannedStack) -> int:
    """Bytes that the router keeps of each token, too: its input in float32, the chosen scores and their sum."""
    return _FLOAT * (stack.model.hidden_size + stack.model.moe.choices + 2) if _scores(stack) else 0


def _scores(stack: PlannedStack) -> bool:
    return Capability.SCORES in stack.routing.router.provides


def _feed_forward(hidden: int, element_size: int) -> int:
    """Bytes that a feed-forward layer keeps of each token: projections, the activation of one, and their product."""
    return 4 * hidden * element_size


def _experts(stack: PlannedStack, element_size: int, is_spread: bool) -> tuple[int, int]:
    """The bytes that the experts keep for all tokens, and those that the caller keeps of each token's outputs."""
    moe, tokens, width = stack.model.moe, stack.tokens, stack.model.hidden_size * element_size
    hidden = moe.expert_size * element_size
    if moe.dispatch == "capacity":
        slots = moe.num_ffn_experts * moe.expert_capacity(tokens)
        # Per slot: its token, the input, and a feed-forward layer. Per choice: its slot, its output, and its weight.
        of_slots = slots * (_INDEX + width + _feed_forward(moe.expert_size, element_size))
        return of_slots + tokens * moe.choices * (_INDEX + width), 0
    rows = stack.sent_rows
    # Input, both projections and their product; the weight.
    of_rows = rows * (width + 3 * hidden + _FLOAT)
    # Where every row came from, and where it went: by choice, by token, by expert.
    of_rows += _INDEX * (2 * rows + tokens * moe.choices)
    if is_spread:
        # Order of arrival, and its inverse.
        of_rows += 2 * _INDEX * rows
    keeps_outputs = any(balancer.needs_outputs for balancer in stack.routing.balance.values())
    outputs = moe.choices * width if keeps_outputs else 0
    return of_rows + tokens * outputs, outputs


def _gradients(stack: PlannedStack, layer: int, element_size: int) -> int:
    """The bytes of a layer's feed-forward gradients: those of its product and both projections, and what computing them
    takes in between (in float32 where rows are weighted), less the product itself, which is freed."""
    moe = stack.model.moe
    if not stack.model.is_moe_layer(layer):
        return stack.tokens * 3 * stack.model.dense_size(layer) * element_size
    if moe.dispatch == "capacity":
        # Gradients of both projections, once apart and once side by side, less what is freed.
        return moe.num_ffn_experts * moe.expert_capacity(stack.tokens) * moe.expert_size * 2 * element_size
    in_between = _FLOAT if element_size == _FLOAT else 3 * _FLOAT
    return stack.sent_rows * moe.expert_size * (3 * element_size + in_between)
