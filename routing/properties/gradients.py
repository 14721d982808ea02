"""Whether a router's gradients arrive and are right.

Shape legend: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_testbed.routing.properties.trial import Trial, hidden_states, make_context, spread
from moe_testbed.routing.properties.violation import Violation
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router

STEPS = ((torch.float64, 1e-6, 1e-5), (torch.float32, 1e-3, 2e-2))
"""(dtype, length of the step, largest relative error) of the finite differences; float32 for a router that computes in
it whatever its parameters are."""
TRIES = 20


def reaches_all(trial: Trial) -> str:
    """A gradient reaches the hidden states and every trainable parameter, and is finite."""
    router, context = trial.router(training=True), make_context()
    x_TD = hidden_states(context).requires_grad_()
    trained = {name: value for name, value in router.named_parameters() if value.requires_grad}
    decision = router(x_TD, context)
    total = _projection(decision, trial.setting.num_experts)
    if not total.requires_grad:
        if trial.config.learned:
            raise Violation(
                "neither weights nor scores carry a gradient, so that nothing is learned; keep them attached to the "
                "parameters, or let learned of its Config be False"
            )
        return "none, as it says: it does not learn"
    gradients = torch.autograd.grad(total, [x_TD, *trained.values()], allow_unused=True)
    missed = []
    for name, gradient in zip(["the hidden states", *(f"'{name}'" for name in trained)], gradients, strict=True):
        if gradient is not None and not gradient.isfinite().all():
            raise Violation(f"the gradient of {name} is not finite")
        if gradient is None or not gradient.any():
            missed.append(name)
    if not trial.config.learned:
        return "finite; it says that it does not learn"
    if not trained:
        raise Violation("has no trainable parameters; let learned of its Config be False")
    if missed:
        raise Violation(
            f"no gradient reaches {missed[0]}; use it in the weights or scores, or set requires_grad to False"
        )
    if not decision.weights_TK.requires_grad:
        raise Violation("the weights carry no gradient, so that the model's loss does not train the router")
    return "reach the hidden states and all trainable parameters, and are finite"


def agrees_with_differences(trial: Trial) -> str:
    """The gradient along a random direction is the slope that two nearby evaluations show."""
    for dtype, length, tolerance in STEPS:
        try:
            error = _relative_error(trial, dtype, length)
        except RuntimeError:
            # Parameters of one dtype and hidden states cast to another: a router for float32 only.
            if dtype is torch.float32:
                raise
            continue
        if error is None:
            return "nothing to differentiate"
        if error.of_float32 and dtype is torch.float64:
            continue
        if error.value > tolerance:
            raise Violation(
                f"the gradient is off by {error.value:.1e} of its size from finite differences in {dtype}; something "
                "that depends on the parameters is detached, or rounded"
            )
        return f"the gradient agrees with them to {error.value:.0e} in {str(dtype).removeprefix('torch.')}"
    raise AssertionError("the last step decides")


@dataclass(frozen=True)
class _Error:
    value: float
    of_float32: bool


def _relative_error(trial: Trial, dtype: torch.dtype, length: float) -> _Error | None:
    """Of the slope along a random direction, at a point where the choice stays the same; None without gradients."""
    E, context = trial.setting.num_experts, make_context()
    for seed in range(TRIES):
        router = trial.router(training=True).to(dtype)
        x_TD = hidden_states(context, seed=100 + seed).to(dtype).requires_grad_()
        moved = [x_TD, *(value for value in router.parameters() if value.requires_grad)]
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype) for value in moved]
        decision = router(x_TD, context)
        total = _projection(decision, E)
        if not total.requires_grad:
            return None
        gradients = torch.autograd.grad(total, moved, allow_unused=True)
        slope = sum(float((g.double() * v).sum()) for g, v in zip(gradients, direction, strict=True) if g is not None)
        ahead, behind = (_at(router, context, moved, direction, sign * length) for sign in (1.0, -1.0))
        here = spread(decision, E)[0]
        if torch.equal(here, spread(ahead, E)[0]) and torch.equal(here, spread(behind, E)[0]):
            difference = float(_projection(ahead, E) - _projection(behind, E)) / (2 * length)
            size = max(abs(slope), abs(difference), 1e-3)
            return _Error(abs(slope - difference) / size, decision.weights_TK.dtype == torch.float32)
    raise Violation(f"at {TRIES} random points a step of {length:g} changes the chosen experts")


@torch.no_grad()
def _at(
    router: Router, context: RoutingContext, moved: list[Tensor], direction: list[Tensor], length: float
) -> RoutingDecision:
    """The decision a step away along the direction; hidden states come first."""
    before = [value.clone() for value in moved]
    for value, along in zip(moved, direction, strict=True):
        value.add_(along, alpha=length)
    decision: RoutingDecision = router(moved[0], context)
    decision = RoutingDecision(*(None if value is None else value.clone() for value in _tensors(decision)))
    for value, old in zip(moved, before, strict=True):
        value.copy_(old)
    return decision


def same_when_recomputed(trial: Trial) -> str:
    """Activation checkpointing, which runs the router again in the backward pass, changes no gradient."""
    context = make_context()

    def gradients(recompute: bool) -> list[Tensor | None]:
        router = trial.router(training=True)
        x_TD = hidden_states(context).requires_grad_()

        def projected(x_TD: Tensor) -> Tensor:
            return _projection(router(x_TD, context), trial.setting.num_experts)

        total = checkpoint(projected, x_TD, use_reentrant=False) if recompute else projected(x_TD)
        if not total.requires_grad:
            return []
        total.backward()
        return [x_TD.grad, *(value.grad for value in router.parameters())]

    kept, again = gradients(recompute=False), gradients(recompute=True)
    for one, other in zip(kept, again, strict=True):
        if (one is None) != (other is None) or (one is not None and other is not None and not torch.equal(one, other)):
            raise Violation("with activation checkpointing, which runs the router twice, its gradients are others")
    return "gradients are the same with activation checkpointing" if kept else "nothing to recompute"


def _projection(decision: RoutingDecision, num_experts: int) -> Tensor:
    """A random linear function of all that is differentiable in a decision, float64 scalar."""
    generator = torch.Generator().manual_seed(17)
    _, weight_TE = spread(decision, num_experts)
    total = weight_TE.new_zeros((), dtype=torch.float64)
    for value_TE in (weight_TE, decision.probabilities_TE, decision.logits_TE):
        if value_TE is not None:
            factor_TE = torch.randn(value_TE.shape, generator=generator, dtype=torch.float64)
            # A barred expert's logit is -inf.
            finite_TE = value_TE.double().masked_fill(value_TE == float("-inf"), 0.0)
            total = total + (factor_TE * finite_TE).sum()
    return total


def _tensors(decision: RoutingDecision) -> list[Tensor | None]:
    return [decision.expert_ids_TK, decision.weights_TK, decision.probabilities_TE, decision.logits_TE]
