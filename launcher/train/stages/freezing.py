"""Parts of a model that are still for a while."""

from __future__ import annotations

from typing import Any

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.model.language_model import LanguageModel

PART = "part"
"""The key in a group of the optimizer's parameters that names the part of the model, "" where none is ever frozen."""


def hold_still(engine: Any, model: LanguageModel, config: ExperimentConfig, step: int) -> None:
    """Freezes the parts that are still in the step that follows ``step`` completed ones, and frees the others."""
    steps = config.training.steps
    model.freeze(config.freeze.frozen_at(step, steps))
    for part, frozen in config.freeze.parts().items():
        if step == frozen.steps(steps):
            _forget_moments(engine, part)


def share_of_rate(config: ExperimentConfig, part: str, step: int) -> float:
    """Returns which share of the learning rate a part has: 0 while it is frozen, so that nothing decays it either, and
    a linear warm-up after that."""
    frozen = config.freeze.parts().get(part)
    if frozen is None:
        return 1.0
    since = step - frozen.steps(config.training.steps)
    return 0.0 if since < 0 else min(1.0, (since + 1) / max(frozen.warmup_steps, 1))


def _forget_moments(engine: Any, part: str) -> None:
    """Sets a part's optimizer state to that of a first step: while the part was frozen, moments of no gradient and the
    count of steps have run on."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for group in engine.optimizer.param_groups:
        if group[PART] == part:
            for parameter in group["params"]:
                for value in optimizer.state.get(parameter, {}).values():
                    value.zero_()
