"""The stacks of a model as a plan sees them: what each is made of, and how many tokens it computes at once."""

from __future__ import annotations

from dataclasses import dataclass

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.model.config import DECODER, ENCODER, ModelConfig
from moe_testbed.routing.config import RoutingConfig


@dataclass(frozen=True)
class PlannedStack:
    """One stack with a micro-batch of one rank.

    Attributes:
        model: its sizes, in the form of a model that has this stack alone.
        tokens: those that it reads, padding included.
        memory_tokens: those of the encoder that each of its blocks attends to; 0 without an encoder in front.
        is_still: it is frozen to the end: it never runs backward.
    """

    name: str
    model: ModelConfig
    routing: RoutingConfig
    tokens: int
    memory_tokens: int
    is_still: bool

    @property
    def sent_rows(self) -> int:
        """Assignments to experts with a feed-forward layer, if all experts are used alike."""
        moe = self.model.moe
        return round(self.tokens * moe.choices * moe.num_ffn_experts / moe.num_routed_experts)


def planned_stacks(config: ExperimentConfig, micro_batch_size: int) -> list[PlannedStack]:
    """Returns the stacks of an experiment's model, from the input to the output.

    Args:
        micro_batch_size: sequences that a rank computes at once.
    """
    lengths, steps = config.objective.lengths(config.data.sequence_length), config.training.steps
    still = config.freeze.frozen_at(steps - 1, steps)
    return [
        PlannedStack(
            name,
            config.model.of_stack(name),
            config.routing.of_stack(name),
            tokens=micro_batch_size * lengths[name],
            memory_tokens=micro_batch_size * lengths.get(ENCODER, 0) if name == DECODER else 0,
            is_still=name in still,
        )
        for name in config.model.stacks
    ]
