"""Names that other people's routers may still use: a decision's ``vectors_EX`` was ``vectors_ED`` once."""

from __future__ import annotations

from functools import wraps
from typing import Any

from moe_testbed.routing.records import RoutingDecision

_decide = RoutingDecision.__init__


@wraps(_decide)
def _decide_by_any_name(*arguments: Any, **named: Any) -> None:
    if "vectors_ED" in named:
        named["vectors_EX"] = named.pop("vectors_ED")
    _decide(*arguments, **named)


def keep_former_names() -> None:
    """Lets decisions be built and read by their former names."""
    RoutingDecision.__init__ = _decide_by_any_name  # type: ignore[method-assign]
    RoutingDecision.vectors_ED = property(lambda decision: decision.vectors_EX)  # type: ignore[attr-defined]
