"""What the children do: train, while a weight or a gradient goes wrong in some steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import DivergedError
from moe_testbed.launcher.train import loop
from moe_testbed.launcher.train import train as training


def train(
    config: dict[str, Any], run_dir: str, fault: str, name: str, steps: list[int], on_ranks: list[int] | None = None
) -> str:
    """Trains with a fault in these steps, counted from 1, at the parameter of this name.

    Args:
        fault: of `FAULTS`.
        on_ranks: where the fault is; None: on all ranks.

    Returns:
        The message of the error by which the training has ended; empty if it has come to its end.
    """
    original = loop.train_step

    def train_step(engine: Any, model: Any, inputs: Any, step: int, *others: Any) -> Any:
        while _hooks:
            _hooks.pop().remove()
        parameter = dict(model.named_parameters())[name]
        if step + 1 not in steps or (on_ranks is not None and dist.get_rank() not in on_ranks):
            return original(engine, model, inputs, step, *others)
        return FAULTS[fault](parameter, lambda: original(engine, model, inputs, step, *others))

    loop.train_step = train_step
    try:
        training.train(ExperimentConfig.model_validate(config), Path(run_dir))
    except DivergedError as error:
        return str(error)
    finally:
        loop.train_step = original
    return ""


def _weight(parameter: torch.nn.Parameter, train_step: Callable[[], Any]) -> Any:
    parameter.data[0] = float("nan")
    return train_step()


def _gradient(parameter: torch.nn.Parameter, train_step: Callable[[], Any]) -> Any:
    """The hook stays until the next step: where it began is looked for after this one."""
    before = parameter.detach().clone()
    _hooks.append(parameter.register_hook(lambda gradient: gradient * float("inf")))
    values = train_step()
    assert torch.equal(parameter, before), "a gradient that is not finite has changed a weight"
    return values


def _update(parameter: torch.nn.Parameter, train_step: Callable[[], Any]) -> Any:
    values = train_step()
    parameter.data[0] = float("inf")
    return values


def _huge_update(parameter: torch.nn.Parameter, train_step: Callable[[], Any]) -> Any:
    """Weights that are finite, and what they make of hidden states is not."""
    values = train_step()
    parameter.data.fill_(3e38)
    return values


_hooks: list[Any] = []

FAULTS: dict[str, Callable[[torch.nn.Parameter, Callable[[], Any]], Any]] = {
    "weight": _weight,
    "gradient": _gradient,
    "update": _update,
    "huge update": _huge_update,
}
