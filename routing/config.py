"""The routing part of an experiment's config."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from torch import nn

from moe_testbed.routing import routers
from moe_testbed.routing.balance import balancers
from moe_testbed.routing.balance.balancer import BALANCERS, BalancerConfig
from moe_testbed.routing.router import ROUTERS, RouterConfig
from moe_testbed.routing.routers.parts.pools import PoolRouterConfig
from moe_testbed.routing.unit import Input, Pooling, Unit

# Importing them registers them.
assert routers.__all__ and balancers.__all__


def _router_config(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "name" not in value:
        raise ValueError(f"a router needs a name: one of {', '.join(ROUTERS.names())}")
    return ROUTERS.get(str(value["name"])).Config.model_validate(value)


def _balancer_config(value: Any) -> Any:
    return BALANCERS.get(str(value["name"])).Config.model_validate(value) if isinstance(value, dict) else value


class RoutingConfig(BaseModel, extra="forbid", frozen=True):
    """Which router, and what keeps the load even."""

    router: Annotated[SerializeAsAny[RouterConfig], BeforeValidator(_router_config)] = Field(
        description="name and options of the router"
    )
    unit: Unit = Field(Unit.TOKEN, description="what is routed as a whole: each token, sequence, or document")
    pooling: Pooling = Field(
        Pooling.PREFIX_MEAN,
        description="unit sequence or document: the router sees the mean of the unit's tokens so far (prefix_mean), of "
        "its first ones (first_m), or of all of them (full_mean, which is not causal)",
    )
    first_tokens: int = Field(16, gt=0, description="pooling first_m: m; the tokens before see those so far")
    input: Input = Field(
        Input.HIDDEN_STATES,
        description="what the router sees: the layer's hidden states, or a learned embedding of the domain's label "
        "(language-guided)",
    )
    depth: Literal["layer_wise", "global"] = Field(
        "layer_wise", description="layer_wise: every layer decides; global: the first MoE layer decides for all"
    )
    balance: dict[str, Annotated[SerializeAsAny[BalancerConfig], BeforeValidator(_balancer_config)]] = Field(
        default_factory=dict,
        description="label -> options of a balancer; the label is its name unless `name` says otherwise; "
        "null takes one out, `none` all",
    )

    encoder: RoutingConfig | None = Field(
        None, description="routing of the encoder in an encoder or encoder_decoder model; null: the same as all this"
    )

    @field_validator("balance", mode="before")
    @classmethod
    def _labels_are_names(cls, value: Any) -> Any:
        if value is None or value == "none":
            return {}
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping of balancers ({', '.join(BALANCERS.names())}) or none, got {value!r}")
        return {
            label: {"name": label, **options} if isinstance(options, dict) else options
            for label, options in value.items()
            if options is not None
        }

    @field_validator("balance")
    @classmethod
    def _labels_are_plain(cls, value: dict[str, BalancerConfig]) -> dict[str, BalancerConfig]:
        for label in value:
            if not re.fullmatch("[a-z][a-z0-9_]*", label) or hasattr(nn.ModuleDict, label):
                raise ValueError(
                    f"{label!r} cannot be the label of a balancer: use lower-case letters, digits and underscores, "
                    "and give its kind in `name`"
                )
        return value

    @model_validator(mode="after")
    def _router_provides_what_balancers_need(self) -> RoutingConfig:
        for label, balancer in self.balance.items():
            missing = sorted(capability.value for capability in balancer.needs - self.router.provides)
            if missing:
                raise ValueError(
                    f"routing.balance.{label} ({balancer.name}) needs {' and '.join(missing)}, which the router "
                    f"'{self.router.name}' does not have; take it out (routing.balance.{label}: null, or "
                    f"routing.balance: none), or choose another router"
                )
        return self

    @model_validator(mode="after")
    def _units_do_not_compete(self) -> RoutingConfig:
        if self.unit is not Unit.TOKEN and isinstance(self.router, PoolRouterConfig):
            raise ValueError(
                f"routing.unit is {self.unit.value} with the router '{self.router.name}', in whose pools the tokens of "
                "a unit would compete for the same places and be routed apart; set routing.unit to token, or choose "
                "another router"
            )
        return self

    def of_stack(self, name: str) -> RoutingConfig:
        """Returns the routing of the stack of this name."""
        return self.encoder if name == "encoder" and self.encoder is not None else self

    @property
    def causal(self) -> bool:
        """In evaluation a token's route does not change when later tokens change."""
        return self.router.causal and (self.unit is Unit.TOKEN or self.pooling is not Pooling.FULL_MEAN)

    @property
    def needs_domains(self) -> bool:
        """The router, or its input, is made from domain labels."""
        return self.router.needs_domains or self.input is Input.DOMAIN_EMBEDDING
