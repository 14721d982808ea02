"""Memory that a training needs on each GPU.

What DeepSpeed keeps is read from its ZeRO stages 1 and 2 (0.19.8): it divides the optimizer state of each parameter
group evenly, shared weights over all ranks, experts over the ranks that hold the same ones; and copies gradients
through a buffer of fixed size. Gradients are added up in float32. ZeRO 1 in bfloat16 is an optimizer of its own there
(``BF16_Optimizer``), which has no such buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moe_testbed.launcher.cluster.layout import Layout
from moe_testbed.launcher.cluster.plan.activations import Activations
from moe_testbed.launcher.cluster.plan.weights import Weight
from moe_testbed.launcher.config.experiment import TrainingConfig

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number in each precision."""
_FLOAT = 4
# What torch, CUDA and NCCL take for themselves, and what lies between the allocator's blocks.
_RESERVED = {"cuda": 2_000_000_000, "cpu": 500_000_000}
# Numbers of an optimizer's parameter group of experts (deepspeed.moe.utils), and of the buffer for gradients.
_EXPERT_GROUP_SIZE = 178_956_971
_BUCKET_SIZE = 500_000_000


@dataclass(frozen=True)
class Group:
    """Weights that DeepSpeed lays end to end and divides over ranks.

    Attributes:
        sizes: the sizes of the weights, in order.
        expert: the group is divided over the ranks that hold the same experts, not over all.
        ranks: number of ranks over which it is divided.
    """

    sizes: tuple[int, ...]
    expert: bool
    ranks: int

    @property
    def partition_size(self) -> int:
        """How many numbers each rank's part has, with what is added to make parts equal and aligned."""
        return -(-sum(self.sizes) // (2 * self.ranks)) * 2

    @property
    def padded_size(self) -> int:
        """How many numbers all parts have."""
        return self.partition_size * self.ranks

    def touched(self) -> list[int]:
        """For each rank, how many numbers the weights have of which it owns a part."""
        touched, start = [0] * self.ranks, 0
        for size in self.sizes:
            for rank in range(start // self.partition_size, (start + size - 1) // self.partition_size + 1):
                touched[rank] += size
            start += size
        return touched


def optimizer_groups(weights: list[Weight], layout: Layout) -> list[Group]:
    """The parameter groups that DeepSpeed makes of ours: matrices and vectors apart, experts apart and in pieces, and
    each of them apart for every part that is frozen for a while."""
    parts = sorted({weight.part for weight in weights})
    trainable = [[weight for weight in weights if weight.trainable and weight.part == part] for part in parts]
    shared = [
        [weight.size for weight in of_part if not weight.expert and (len(weight.shape) > 1) is are_matrices]
        for of_part in trainable
        for are_matrices in (True, False)
    ]
    experts = [
        piece for of_part in trainable for piece in _pieces([weight.size for weight in of_part if weight.expert])
    ]
    groups = [Group(tuple(sizes), False, layout.world_size) for sizes in shared if sizes]
    return groups + [Group(tuple(sizes), True, layout.expert_data_parallel_size) for sizes in experts]


def _pieces(sizes: list[int]) -> list[list[int]]:
    """Returns the sizes of experts in as few groups of limited size as there can be in this order."""
    pieces: list[list[int]] = []
    for size in sizes:
        if not pieces or sum(pieces[-1]) + size > _EXPERT_GROUP_SIZE:
            pieces.append([])
        pieces[-1].append(size)
    return pieces


@dataclass(frozen=True)
class Memory:
    """Bytes on the GPU that needs most.

    Attributes:
        parameters: in the model's precision.
        gradients: in float32; of ZeRO 2 those of the rank's part, in float32 those of all weights of which it has some.
        optimizer_state: Adam's two moments in float32, and with ZeRO a float32 copy of the weights.
        reduction_buffer: where ZeRO gathers gradients before it sends them.
        activations: at most.
        activations_otherwise: with activation checkpointing if it is off, without if it is on.
        copies: what is copied when the activations are gone: gradients to be sent, or numbers of the optimizer's step.
        reserved: for the libraries themselves.
    """

    parameters: int
    gradients: int
    optimizer_state: int
    reduction_buffer: int
    activations: int
    activations_otherwise: int
    copies: int
    reserved: int

    @property
    def parts(self) -> dict[str, int]:
        """What the total is made of."""
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "gradients' buffer": self.reduction_buffer,
            "activations": self.activations,
            "copies, beyond activations": max(0, self.copies - self.activations),
            "reserved for libraries": self.reserved,
        }

    @property
    def total(self) -> int:
        """The bytes at the start of the backward pass, or in the optimizer's step if that needs more."""
        return sum(self.parts.values())


def planned_memory(
    training: TrainingConfig,
    weights: list[Weight],
    layout: Layout,
    activations: Activations,
    accelerator: Literal["cuda", "cpu"],
) -> Memory:
    """Returns the memory that a training takes.

    Args:
        weights: of one rank.
        activations: of one micro-batch on one rank.
        accelerator: on a CPU what is allocated and never written takes no memory.
    """
    element = ELEMENT_SIZES[training.precision]
    groups = optimizer_groups(weights, layout)
    trainable = sum(sum(group.sizes) for group in groups)
    bucket = _BUCKET_SIZE if accelerator == "cuda" else min(_BUCKET_SIZE, trainable)
    has_bucket = training.zero_stage > 0 and not _is_bf16_optimizer(training)
    return Memory(
        parameters=element * sum(weight.size for weight in weights),
        gradients=_FLOAT * _gradient_numbers(training, groups, layout),
        optimizer_state=optimizer_numbers(groups, training.zero_stage) * _FLOAT,
        reduction_buffer=element * bucket if has_bucket else 0,
        activations=activations.peak(training.activation_checkpointing),
        activations_otherwise=activations.peak(not training.activation_checkpointing),
        copies=_copies(training, groups),
        reserved=_RESERVED[accelerator],
    )


def _is_bf16_optimizer(training: TrainingConfig) -> bool:
    return training.zero_stage == 1 and training.precision == "bfloat16"


def _gradient_numbers(training: TrainingConfig, groups: list[Group], layout: Layout) -> int:
    """How many numbers the gradients have that a rank keeps from one micro-batch to the next."""
    if training.zero_stage == 2 and training.precision == "bfloat16":
        return sum(group.partition_size for group in groups)
    if training.zero_stage == 2:
        return max(touched_numbers(groups, layout))
    if _is_bf16_optimizer(training):
        return sum(group.padded_size for group in groups)
    return sum(sum(group.sizes) for group in groups)


def _copies(training: TrainingConfig, groups: list[Group]) -> int:
    """Bytes: gradients laid end to end to be sent; or in the step the roots of Adam's second moments, with ZeRO group
    by group and beside a float32 copy of the gradients (but for ZeRO 1 in bfloat16: all at once and no copy)."""
    trainable, element = sum(sum(group.sizes) for group in groups), ELEMENT_SIZES[training.precision]
    if training.zero_stage == 0:
        return _FLOAT * trainable
    if _is_bf16_optimizer(training):
        sent = [
            _bytes_to_send([g.padded_size for g in groups if g.expert is expert], element) for expert in (False, True)
        ]
        return max(*sent, _FLOAT * sum(group.partition_size for group in groups))
    largest = max(group.partition_size for group in groups)
    return max(element * min(_BUCKET_SIZE, trainable), 2 * _FLOAT * largest)


def _bytes_to_send(sizes: list[int], element_size: int) -> int:
    """The most bytes of copies, where groups of float32 gradients are collected until a bucket is full: laid end to end
    if there are several, and all of them rounded."""
    most, collected = 0, []
    for size in sizes:
        collected.append(size)
        most = max(most, sum(collected) * (element_size + (_FLOAT if len(collected) > 1 else 0)))
        if sum(collected) > _BUCKET_SIZE:
            collected = []
    return most


def optimizer_numbers(groups: list[Group], zero_stage: int) -> int:
    """How many numbers a rank's optimizer state has."""
    if zero_stage == 0:
        return 2 * sum(sum(group.sizes) for group in groups)
    return 3 * sum(group.partition_size for group in groups)


def touched_numbers(groups: list[Group], layout: Layout) -> list[int]:
    """For each rank, how many numbers the weights have of which it owns a part.

    ZeRO 2 keeps gradients of whole weights.
    """
    by_group = [(group.touched(), layout.expert_parallel_size if group.expert else 1) for group in groups]
    return [sum(touched[rank // divisor] for touched, divisor in by_group) for rank in range(layout.world_size)]
