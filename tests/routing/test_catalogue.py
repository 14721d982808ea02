"""The catalogue names all that there is, and every router has a recipe that builds it."""

import ast
import re
from pathlib import Path

import pytest
import yaml

from moe_testbed.routing.balance.balancer import BALANCERS
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.scopes import Estimator, Scope
from moe_testbed.routing.unit import Input, Pooling, Unit

ROOT = Path(__file__).parents[2]
CATALOGUE = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        *ROUTERS.names(),
        *BALANCERS.names(),
        *(value.value for enum in (Scope, Estimator, Unit, Pooling, Input) for value in enum),
    ],
)
def test_everything_is_named(name: str):
    assert f"`{name}`" in CATALOGUE or f"`{name}:" in CATALOGUE


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", CATALOGUE):
        assert target.startswith("https://") or (ROOT / "docs" / target).exists(), target


@pytest.mark.parametrize("name", ROUTERS.names())
def test_every_router_has_a_recipe(name: str):
    text = (ROOT / "configs" / "routers" / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert RoutingConfig.model_validate(yaml.safe_load(text)).router.name == name


@pytest.mark.parametrize("name", ROUTERS.names())
def test_every_router_names_its_oracle(name: str):
    found = re.search(r"Oracle: ``(\w+)`` in (tests/routing/\w+\.py)\.", ROUTERS.get(name).__doc__ or "")
    assert found is not None
    functions = {
        node.name: {
            decorator.args[0].value
            for decorator in node.decorator_list
            if isinstance(decorator, ast.Call) and isinstance(decorator.args[0], ast.Constant)
        }
        for node in ast.parse((ROOT / found[2]).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert name in functions[found[1]]
