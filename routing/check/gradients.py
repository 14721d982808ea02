"""Whether a router's gradients arrive and are right.

Shape legend: T tokens, M model width, E experts, K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_testbed.routing.check.trial import Trial, hidden_states, make_context, spread
from moe_testbed.routing.check.violation import Violation
from moe_testbed.routing.records import RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router

STEPS = ((torch.float64, 1e-6, 1e-5), (torch.float32, 1e-3, 2e-2))
"""(dtype, length of the step, largest relative error) of the finite differences; the second is for routers that compute
in float32 whatever their parameters are."""
TRIES = 20


def reaches_all(trial: Trial) -> str:
    """A gradient reaches the hidden states and every trainable parameter, and is finite."""
    router, context = trial.router(training=True), make_context()
    x_TM = hidden_states(context).requires_grad_()
    trained = {name: value for name, value in router.named_parameters() if value.requires_grad}
    decision = router(x_TM, context)
    total = _projection(decision, trial.setting.num_experts)
    if not total.requires_grad:
        if trial.config.learned:
            raise Violation(
                "neither weights nor scores carry a gradient, so that nothing is learned; keep them attached to the "
                "parameters, or let learned of its Config be False"
            )
        return "none, as it says: it does not learn"
    gradients = torch.autograd.grad(total, [x_TM, *trained.values()], allow_unused=True)
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
    error: float | None = None
    for dtype, length, tolerance in STEPS:
        try:
            error = _error_of_slope(trial, dtype, length)
        except RuntimeError:
            # A router for float32 only: its hidden states are cast, its parameters are not.
            if dtype is torch.float32:
                raise
            continue
        if error is None:
            return "nothing to differentiate"
        if error <= tolerance:
            return f"the gradient agrees with them to {error:.0e} in {str(dtype).removeprefix('torch.')}"
    raise Violation(
        f"the gradient is off by {error:.1g} of its size from finite differences; something that depends on the "
        "parameters or the hidden states is detached, or rounded"
    )


def _error_of_slope(trial: Trial, dtype: torch.dtype, length: float) -> float | None:
    """Error of the slope along a random direction, relative to the gradient's norm, at a point around which the choice
    stays the same; None without gradients."""
    E, context = trial.setting.num_experts, make_context()
    for seed in range(TRIES):
        router = trial.router(training=True).to(dtype)
        x_TM = hidden_states(context, seed=100 + seed).to(dtype).requires_grad_()
        moved = [x_TM, *(value for value in router.parameters() if value.requires_grad)]
        generator = torch.Generator().manual_seed(seed)
        direction = [torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype) for value in moved]
        decision = router(x_TM, context)
        total = _projection(decision, E)
        if not total.requires_grad:
            return None
        gradients = torch.autograd.grad(total, moved, materialize_grads=True)
        ahead, behind = (_at(router, context, moved, direction, sign * length) for sign in (1.0, -1.0))
        here_TE = spread(decision, E)[0]
        if torch.equal(here_TE, spread(ahead, E)[0]) and torch.equal(here_TE, spread(behind, E)[0]):
            slope = sum(float((g.double() * v).sum()) for g, v in zip(gradients, direction, strict=True))
            seen = float(_projection(ahead, E) - _projection(behind, E)) / (2 * length)
            norm = sum(float(g.double().square().sum()) for g in gradients) ** 0.5
            return abs(slope - seen) / max(norm, 1e-9)
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
    for value, old in zip(moved, before, strict=True):
        value.copy_(old)
    return decision


def same_when_recomputed(trial: Trial) -> str:
    """Activation checkpointing, which runs the router again in the backward pass, changes no gradient."""
    context = make_context()

    def gradients(recompute: bool) -> list[Tensor | None]:
        router = trial.router(training=True)
        x_TM = hidden_states(context).requires_grad_()

        def projected(x_TM: Tensor) -> Tensor:
            return _projection(router(x_TM, context), trial.setting.num_experts)

        total = checkpoint(projected, x_TM, use_reentrant=False) if recompute else projected(x_TM)
        if not total.requires_grad:
            return []
        total.backward()
        return [x_TM.grad, *(value.grad for value in router.parameters())]

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
