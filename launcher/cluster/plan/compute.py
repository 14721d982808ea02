"""What a training computes: its model's size, and the floating point operations of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.flops import StepFlops
from moe_testbed.launcher.config.model_size import ModelSize, model_on_meta, size_of


@dataclass(frozen=True)
class Phase:
    """Steps in which the same parts are frozen.

    Attributes:
        frozen: names of these parts.
        steps: how many steps.
        flops: what one of them takes on all ranks together, by part; `output` is the output layer.
    """

    frozen: frozenset[str]
    steps: int
    flops: Mapping[str, int]

    @property
    def total(self) -> int:
        """The FLOPs of one step."""
        return sum(self.flops.values())


@dataclass(frozen=True)
class Compute:
    """The arithmetic of a training.

    Attributes:
        size: of the model, all ranks' experts included.
        phases: in order; one where nothing is ever frozen.
    """

    size: ModelSize
    phases: tuple[Phase, ...]

    @property
    def total(self) -> int:
        """The FLOPs of all steps."""
        return sum(phase.steps * phase.total for phase in self.phases)


def planned_compute(config: ExperimentConfig) -> Compute:
    """Returns the arithmetic of a training. It is exact but for the number of targets, of which the mean is taken.

    Raises:
        ConfigError: router, model and mix do not go together.
    """
    model, length, training = model_on_meta(config), config.data.sequence_length, config.training
    step_flops = StepFlops(model, config.objective, length, training.global_batch_size)
    targets = round(training.global_batch_size * config.objective.mean_targets(length))
    ends = sorted({part.steps(training.steps) for part in config.freeze.parts().values()} | {training.steps})
    phases, first = [], 0
    for end in ends:
        if end == first:
            continue
        frozen = config.freeze.frozen_at(first, training.steps)
        flops = {**step_flops.stacks(frozen), "output": step_flops.output(frozen, targets)}
        phases.append(Phase(frozen, end - first, flops))
        first = end
    return Compute(size_of(model, length, config.objective), tuple(phases))
