"""Which models can be exported, and as what."""

from __future__ import annotations

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.routers.frozen import Frozen
from moe_testbed.routing.routers.hash import Hash
from moe_testbed.routing.routers.noisy_top_k import NoisyTopK
from moe_testbed.routing.routers.sigmoid import Sigmoid
from moe_testbed.routing.routers.top_k import TopK
from moe_testbed.routing.routers.top_k_softmax import TopKSoftmax
from moe_testbed.routing.unit import Input, Unit

EUROBERT, LLAMA, MIXTRAL, OWN = "eurobert", "llama", "mixtral", "moe_testbed"
"""Values of transformers' `model_type`."""

# A class that is made of one of these may route otherwise.
EXPORTED = TopK, Frozen, NoisyTopK, TopKSoftmax, Sigmoid, Hash


def refusal(config: ExperimentConfig) -> str | None:
    """Returns why a model of this config cannot be exported; None if it can."""
    if not config.model.num_moe_layers:
        return None
    for stack in config.model.stacks:
        if config.model.of_stack(stack).num_moe_layers and (reason := _routing_refusal(config.routing.of_stack(stack))):
            return reason
    if config.model.moe.num_zero_computation_experts:
        return "zero-computation experts cannot be exported: model.moe.num_zero_experts and its like must be 0"
    if config.model.moe.dispatch == "capacity":
        return (
            "model.moe.dispatch is capacity, with which a token's output depends on the other texts of its batch; "
            "dropless can be exported"
        )
    return None


def _routing_refusal(routing: RoutingConfig) -> str | None:
    names = [router.Config.model_fields["name"].default for router in EXPORTED]
    if routing.router.name not in names:
        return (
            f"this router cannot be exported: routing.router.name is {routing.router.name}; what can is "
            f"{', '.join(names)}"
        )
    if routing.unit is not Unit.TOKEN:
        return f"this routing cannot be exported: routing.unit is {routing.unit.value}; what can is token"
    if routing.input is not Input.HIDDEN_STATES:
        return f"this routing cannot be exported: routing.input is {routing.input.value}, which reads domain labels"
    return None


def form_of(model: LanguageModel) -> str:
    """Returns the `model_type` of a model that can be exported: one of transformers' own where that computes the same,
    else `OWN`."""
    config = model.config
    if config.architecture == "encoder_decoder":
        return OWN
    if not config.num_moe_layers:
        (stack,) = model.stacks.values()
        widths = {stack.config.dense_size(layer) for layer in range(stack.config.num_layers)}
        if len(widths) > 1:
            return OWN
        return EUROBERT if config.architecture == "encoder" else LLAMA
    return MIXTRAL if config.architecture == "causal" and _is_mixtral(model) else OWN


def _is_mixtral(model: LanguageModel) -> bool:
    """Whether all layers have experts alone, and weights are softmax over those that are chosen."""
    moe, (stack,) = model.config.moe, model.stacks.values()
    normalised = all(
        type(router) is TopKSoftmax or (isinstance(router, TopK) and router.normalise) for router in model.routers()
    )
    biased = stack.balancing is not None and stack.balancing.selection_bias_YE() is not None
    return normalised and not biased and len(model.routers()) == model.config.num_layers and not moe.num_shared_experts
