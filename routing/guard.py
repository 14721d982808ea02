"""The guard between routers and dispatch: what is no routing decision goes no further.

Shape legend: T tokens, E experts, K choices, W places for choices.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_testbed.routing.errors import NotFiniteError, RouterError
from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Capability, RouterConfig


def checked(
    decision: RoutingDecision,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    config: RouterConfig,
    context: RoutingContext,
    training: bool,
) -> RoutingDecision:
    """The decision, once it is known that it can be carried out.

    In training one with numbers that are not finite is let through, with no weight that is a number. So the loss is no
    number either, by which all ranks see together that the training has diverged; a rank that stopped by itself would
    leave the others waiting for it. Arguments and errors as those of :func:`check_decision`.
    """
    try:
        check_decision(decision, num_experts, top_k, num_tokens, config, context.layer, context.step)
    except NotFiniteError:
        if not training:
            raise
        ids_TK = decision.expert_ids_TK.clamp(0, num_experts - 1)
        return replace(decision, expert_ids_TK=ids_TK, weights_TK=decision.weights_TK * float("nan"))
    return decision


def check_decision(
    decision: RoutingDecision,
    num_experts: int,
    top_k: int,
    num_tokens: int,
    config: RouterConfig,
    layer: int,
    step: int,
) -> None:
    """Stops a router whose decision cannot be carried out.

    Shapes and dtypes are compared on the host. Values are folded into one boolean, so that a GPU waits once; which of
    them is wrong is looked up only then. That the experts of a token differ is left to
    :mod:`moe_testbed.routing.check.check`: it would cost more than all the rest.

    Args:
        decision: what the router returned for ``num_tokens`` tokens.
        config: the router's; it says whether the number of choices may vary and whether there are scores.
        layer, step: where the router was asked, for the message.

    Raises:
        RouterError: what was returned, what is allowed, and how to mend it.
        NotFiniteError: the same, where numbers are not finite.
    """
    where = f"router '{config.name}' in MoE layer {layer} at step {step}"
    if problem := _form_problem(decision, num_experts, top_k, num_tokens, config):
        raise RouterError(f"{where} {problem}")
    if not num_tokens or bool(_values_look_right(decision, num_experts, config)):
        return
    if problem := not_finite(decision):
        raise NotFiniteError(
            f"{where} {problem}; only finite numbers are allowed: lower training.learning_rate, or look for a division "
            "by zero in it"
        )
    if problem := _id_problem(decision, num_experts, config):
        raise RouterError(f"{where} {problem}")


def _form_problem(
    decision: RoutingDecision, num_experts: int, top_k: int, num_tokens: int, config: RouterConfig
) -> str | None:
    """What is wrong with types, shapes and dtypes; None if nothing is."""
    if not isinstance(decision, RoutingDecision):
        return f"returned a {type(decision).__name__}; return a RoutingDecision"
    ids_TW, weights_TW = decision.expert_ids_TK, decision.weights_TK
    for name, value in (("expert_ids_TK", ids_TW), ("weights_TK", weights_TW)):
        if not isinstance(value, Tensor):
            return f"returned {name} as {type(value).__name__}; return a tensor"
    if ids_TW.dtype != torch.int64:
        return f"returned expert_ids_TK of {ids_TW.dtype}; only torch.int64 is allowed: convert them with .long()"
    if ids_TW.dim() != 2 or len(ids_TW) != num_tokens or not ids_TW.shape[1]:
        return (
            f"returned expert_ids_TK of shape {list(ids_TW.shape)} for {num_tokens} tokens; "
            f"one row per token is allowed: return [{num_tokens}, {top_k}]"
        )
    if ids_TW.shape[1] != top_k and not config.varying_top_k:
        return (
            f"returned {ids_TW.shape[1]} experts per token where model.moe.top_k is {top_k}; return [{num_tokens}, "
            f"{top_k}], or let varying_top_k of its Config be True"
        )
    if weights_TW.shape != ids_TW.shape or not weights_TW.is_floating_point():
        return (
            f"returned weights_TK of {weights_TW.dtype} and shape {list(weights_TW.shape)}; only floating numbers in "
            f"the shape of expert_ids_TK, {list(ids_TW.shape)}, are allowed: return one weight per choice"
        )
    has_scores = Capability.SCORES in config.provides
    for name, score_TE in (("probabilities_TE", decision.probabilities_TE), ("logits_TE", decision.logits_TE)):
        if (score_TE is not None) != has_scores:
            returned, claim = ("no ", "provides") if has_scores else ("", "does not provide")
            return (
                f"returned {returned}{name}, though its Config {claim} scores (Capability.SCORES); mend one of them, "
                "since balancers rely on it"
            )
        if score_TE is not None and (score_TE.shape != (num_tokens, num_experts) or not score_TE.is_floating_point()):
            return (
                f"returned {name} of {score_TE.dtype} and shape {list(score_TE.shape)}; only floating numbers of shape "
                f"[{num_tokens}, {num_experts}] (tokens, experts) are allowed: return a score of every expert"
            )
    return None


@torch.no_grad()
def _values_look_right(decision: RoutingDecision, num_experts: int, config: RouterConfig) -> Tensor:
    """False where a value may be wrong, bool scalar, still on the device.

    One pass over each tensor and nothing of its size in memory: a sum is finite only if all its terms are. A sum that
    overflows is a false alarm, which :func:`not_finite` settles.
    """
    lowest, highest = decision.expert_ids_TK.aminmax()
    right = (lowest >= _lowest_id(config)) & (highest < num_experts) & decision.weights_TK.sum().isfinite()
    if decision.probabilities_TE is not None:
        right &= decision.probabilities_TE.sum().isfinite()
    if decision.logits_TE is not None:
        # A barred expert has -inf.
        right &= decision.logits_TE.amax() < float("inf")
    return right


@torch.no_grad()
def not_finite(decision: RoutingDecision) -> str | None:
    """Which numbers of a decision are not finite; None if all are."""
    for name, values in (("weights_TK", decision.weights_TK), ("probabilities_TE", decision.probabilities_TE)):
        if values is not None and (count := int((~values.isfinite()).sum())):
            return f"returned {count} NaN or infinite {name} of {values.numel()}"
    logits_TE = decision.logits_TE
    if logits_TE is not None and (count := int((logits_TE.isnan() | logits_TE.isposinf()).sum())):
        return f"returned {count} NaN or positive infinite logits_TE of {logits_TE.numel()}"
    return None


@torch.no_grad()
def _id_problem(decision: RoutingDecision, num_experts: int, config: RouterConfig) -> str | None:
    """Which expert there is not; None after a false alarm."""
    ids_TW, lowest = decision.expert_ids_TK, _lowest_id(config)
    outside = ids_TW[(ids_TW < lowest) | (ids_TW >= num_experts)]
    if not outside.numel():
        return None
    more = f" and {outside.numel() - 1} more like it" if outside.numel() > 1 else ""
    none = f", and {NO_EXPERT} for none," if config.varying_top_k else ""
    hint = "" if config.varying_top_k or outside[0] != NO_EXPERT else ", or let varying_top_k of its Config be True"
    return (
        f"returned expert {int(outside[0])}{more}; only 0 to {num_experts - 1}{none} are allowed: choose among "
        f"model.moe.num_experts = {num_experts}{hint}"
    )


def _lowest_id(config: RouterConfig) -> int:
    return NO_EXPERT if config.varying_top_k else 0
