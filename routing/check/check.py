"""What every router promises, tried on small random problems; a violation is told in plain words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from moe_testbed.routing.check.decisions import (
    config_is_kept,
    decision_is_one,
    experts_differ,
    probabilities_are_some,
    provides_what_it_says,
)
from moe_testbed.routing.check.dependence import (
    does_not_depend_on_the_split,
    ignores_padding,
    is_causal,
    reads_labels_only_if_it_says,
)
from moe_testbed.routing.check.gradients import agrees_with_differences, reaches_all, same_when_recomputed
from moe_testbed.routing.check.numerics import decides_in_float32, stays_on_its_device
from moe_testbed.routing.check.state import is_deterministic, routes_alike_within_a_step, state_is_kept
from moe_testbed.routing.check.trial import Trial
from moe_testbed.routing.check.violation import Violation, told
from moe_testbed.routing.router import Router, RouterConfig


@dataclass(frozen=True)
class Finding:
    """What came of trying one property.

    Attributes:
        property: its name.
        ok: it holds, or the router says of itself that it does not.
        text: what was found, in plain words.
    """

    property: str
    ok: bool
    text: str


PROPERTIES: dict[str, Callable[[Trial], str]] = {
    "config": config_is_kept,
    "decision": decision_is_one,
    "experts": experts_differ,
    "probabilities": probabilities_are_some,
    "provides": provides_what_it_says,
    "gradients": reaches_all,
    "finite differences": agrees_with_differences,
    "recomputation": same_when_recomputed,
    "causality": is_causal,
    "labels": reads_labels_only_if_it_says,
    "micro-batches": does_not_depend_on_the_split,
    "determinism": is_deterministic,
    "optimizer step": routes_alike_within_a_step,
    "state": state_is_kept,
    "precision": decides_in_float32,
    "device": stays_on_its_device,
    "padding": ignores_padding,
}
"""Name of each property -> what tries it. The first two are asked first: without them the others mean nothing."""


def check_router(router_class: type[Router], config: RouterConfig) -> list[Finding]:
    """Tries every property on a router. If it cannot be built, or returns no decision, the others are not tried.

    Args:
        router_class: the class of the router.
        config: its options, an object of ``router_class.Config``.
    """
    with _undisturbed():
        try:
            trial = Trial.of(router_class, config)
        except Exception as error:
            return [Finding("builds", False, f"cannot be built: {told(error)}")]
        size = f"for {trial.setting.num_experts} experts, {trial.setting.top_k} per token"
        findings = [Finding("builds", True, size)]
        for name, holds in PROPERTIES.items():
            findings.append(_tried(name, holds, trial))
            if name == "decision" and not findings[-1].ok:
                break
        return findings


def _tried(name: str, holds: Callable[[Trial], str], trial: Trial) -> Finding:
    try:
        return Finding(name, True, holds(trial))
    except Violation as violation:
        return Finding(name, False, str(violation))
    except Exception as error:
        return Finding(name, False, f"raises {told(error)}")


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leaves torch's generator as it was, and uses one thread: on problems so small more only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(threads)
