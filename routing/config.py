"""The routing part of an experiment's config."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, field_validator, model_validator
from torch import nn

from moe_testbed.routing import balancers, routers
from moe_testbed.routing.balancer import BALANCERS, BalancerConfig
from moe_testbed.routing.router import ROUTERS, RouterConfig

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
    balance: dict[str, Annotated[SerializeAsAny[BalancerConfig], BeforeValidator(_balancer_config)]] = Field(
        default_factory=dict,
        description="label -> options of a balancer; the label is its name unless `name` says otherwise; "
        "null takes one out, `none` all",
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
            if not re.fullmatch("[a-z][a-z0-9_]*", label) or "expert" in label or hasattr(nn.ModuleDict, label):
                raise ValueError(
                    f"{label!r} cannot be the label of a balancer: use lower-case letters, digits and underscores, "
                    "without the word expert, and give its kind in `name`"
                )
        return value

    @model_validator(mode="after")
    def _balanced_routers_have_scores(self) -> RoutingConfig:
        if self.balance and not self.router.has_scores:
            raise ValueError(
                f"the router '{self.router.name}' has no scores that {', '.join(self.balance)} could balance; set "
                f"routing.balance to none"
            )
        return self
