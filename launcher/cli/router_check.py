"""`moe-testbed router check`: tries routers and prints what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence

from moe_testbed.launcher.config.experiment import RULES, VARIANTS
from moe_testbed.launcher.config.messages import validate
from moe_testbed.launcher.config.yaml_tree import parse_overrides
from moe_testbed.launcher.errors import FAILED, ConfigError
from moe_testbed.routing.check.check import Finding, check_router
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.router import ROUTERS, RouterConfig

_OPTION = re.compile(r"[a-z_]\w*(\.\w+)*=")


def check_routers(texts: Sequence[str], check_all: bool) -> int:
    """Checks routers one after the other and prints a line per property, and a summary.

    Args:
        texts: names, and options of the form ``option=value`` for all of them.
        check_all: all built-in routers; then there are no ``texts``.

    Returns:
        Exit status: 1 if a router does not do what it says, else 0.

    Raises:
        ConfigError: no such router, or it has no such option.
    """
    names = [text for text in texts if not _OPTION.match(text)]
    options = [text for text in texts if _OPTION.match(text)]
    if check_all == bool(texts):
        raise ConfigError("router check takes the names of routers and their options, or --all; give one of the two")
    # All names and options are read before the first router is tried.
    configs = [_config(name, options) for name in (ROUTERS.names() if check_all else names)]
    if not configs:
        raise ConfigError(f"router check got options ({', '.join(options)}) but no name of a router; add one")
    violations: dict[str, list[str]] = {}
    for config in configs:
        findings = check_router(ROUTERS.get(config.name), config)
        _print(config.name, findings)
        violations[config.name] = [finding.property for finding in findings if not finding.ok]
    _summarise(violations, [config.name for config in configs if not config.causal])
    return FAILED if any(violations.values()) else 0


def _config(name: str, options: Iterable[str]) -> RouterConfig:
    overrides = [f"router.name={json.dumps(name)}", *(f"router.{option}" for option in options)]
    return validate(RoutingConfig, parse_overrides(overrides, RULES), VARIANTS).router


def _print(name: str, findings: Sequence[Finding]) -> None:
    width = max(len(finding.property) for finding in findings)
    print(name)
    for finding in findings:
        print(f"  {'ok' if finding.ok else 'VIOLATED':<8}  {finding.property:<{width}}  {finding.text}")
    print(flush=True)


def _summarise(violations: dict[str, list[str]], not_causal: Sequence[str]) -> None:
    good = [name for name, violated in violations.items() if not violated]
    print(f"{len(good)} of {len(violations)} routers do all that they say")
    if not_causal:
        print(f"not causal, as they say: {', '.join(not_causal)}")
    for name, violated in violations.items():
        if violated:
            print(f"violated by {name}: {', '.join(violated)}")
