"""Routers and balancers by name: built in, from a module, from a file, from an installed package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.routing.balance.balancer import BALANCERS
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.router import ROUTERS, RouterConfig

Write = Callable[[str, str], Path]

ROUTER = """
    from __future__ import annotations

    from pydantic import Field

    from moe_testbed.routing.router import Router, RouterConfig

    class MineConfig(RouterConfig):
        width: int = Field(3, gt=0)

    class Mine(Router):
        Config = MineConfig

    class Plain(Router):
        pass

    class Odd(Router):
        Config = dict

    class NoRouter:
        pass
"""
BALANCER = """
    from moe_testbed.routing.balance.balancer import Balancer, BalancerConfig

    class GentleConfig(BalancerConfig):
        push: float = 1.0

    class Gentle(Balancer):
        Config = GentleConfig
"""


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    """What a test imports is forgotten after it."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith("moe_testbed"):
            del sys.modules[name]
    for registry in (ROUTERS, BALANCERS):
        registry._outside.clear()


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes it look as if installed packages had entry points of group moe_testbed.routers."""

    def offer(*pairs: tuple[str, str]) -> None:
        found = [metadata.EntryPoint(name, value, "moe_testbed.routers") for name, value in pairs]
        monkeypatch.setattr(metadata, "entry_points", lambda *, group: found if group == "moe_testbed.routers" else [])

    return offer


def refused(name: str) -> str:
    with pytest.raises(ValueError) as error:
        ROUTERS.get(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["mine.py:Mine", "mine:Mine", "sub/mine.py:Mine", "sub.mine:Mine"])
def test_a_class_from_outside(name: str, write: Write) -> None:
    write("mine.py", ROUTER)
    write("sub/mine.py", ROUTER)
    path = list(sys.path)
    cls = ROUTERS.get(name)
    assert cls.__name__ == "Mine" and cls.Config.model_fields["width"].default == 3
    assert ROUTERS.get(name) is cls
    assert sys.path == path
    config = RoutingConfig.model_validate({"router": {"name": name, "width": 5}}).router
    assert type(config) is cls.Config and config.model_dump() == {"name": name, "width": 5}
    assert name not in ROUTERS.names()


def test_an_absolute_path_and_a_relative_one_are_the_same_class(write: Write) -> None:
    path = write("mine.py", ROUTER)
    assert ROUTERS.get("mine.py:Mine") is ROUTERS.get(f"{path}:Mine")


def test_a_relative_path_is_that_of_the_working_directory_at_the_time(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write("one/mine.py", ROUTER)
    write("two/mine.py", ROUTER)
    monkeypatch.chdir(tmp_path / "one")
    first = ROUTERS.get("mine.py:Mine")
    monkeypatch.chdir(tmp_path / "two")
    assert ROUTERS.get("mine.py:Mine") is not first


def test_a_class_without_a_config_has_the_base_s(write: Write) -> None:
    write("mine.py", ROUTER)
    assert ROUTERS.get("mine.py:Plain").Config is RouterConfig
    assert RoutingConfig.model_validate({"router": {"name": "mine.py:Plain"}}).router.name == "mine.py:Plain"


def test_the_working_directory_hides_nothing(write: Write) -> None:
    write("json.py", "raise AssertionError('hidden')")
    write("mine.py", "import json\njson.dumps({})\n" + "from moe_testbed.routing.routers.top_k import TopK as Mine\n")
    assert ROUTERS.get("mine:Mine").__name__ == "TopK"
    assert "there is no router in it" in refused("json:Mine")


def test_a_file_finds_its_neighbours_in_the_working_directory(write: Write) -> None:
    write("neighbour_of_mine.py", "from moe_testbed.routing.routers.top_k import TopK\n")
    write("mine.py", "from neighbour_of_mine import TopK as Mine\n")
    assert ROUTERS.get("mine.py:Mine").__name__ == "TopK"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:Mine", r"'nowhere:Mine': there is no module 'nowhere', neither installed nor in /"),
        ("mine.deep:Mine", "'mine.deep:Mine': there is no module 'mine.deep', neither installed nor in /"),
        ("nowhere.py:Mine", "'nowhere.py:Mine': there is no file /"),
        ("mine.py:Mime", "mine.py has no 'Mime'. Did you mean 'Mine'? (the routers there: Mine, Plain, Odd)"),
        ("mine.py:NoRouter", "is no router: it must be a subclass of moe_testbed.routing.router.Router"),
        ("mine.py:Router", "is no router: it must be a subclass"),
        ("mine.py:Field", "is no router: it must be a subclass"),
        ("mine.py:Odd", "has a Config that is no subclass of moe_testbed.routing.router.RouterConfig"),
        ("mine.py:", "names no router; write package.module:Class or path/to/file.py:Class"),
        (":Mine", "names no router; write package.module:Class or path/to/file.py:Class"),
        ("a:b:Mine", "there is no module 'a:b'"),
        ("broken.py:Mine", "importing the router 'broken.py:Mine' raises ZeroDivisionError: division by zero; mend"),
        ("quits.py:Mine", "raises SystemExit: 3; mend its module"),
        ("syntax.py:Mine", "raises SyntaxError: "),
        ("needs.py:Mine", "raises ModuleNotFoundError: No module named 'not_installed_at_all'; mend its module"),
        ("zzzz", "Unknown router 'zzzz'. Available: base, "),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(name: str, words: str, write: Write) -> None:
    write("mine.py", ROUTER)
    write("broken.py", "1 / 0\n")
    write("quits.py", "raise SystemExit(3)\n")
    write("syntax.py", "class Mine(\n")
    write("needs.py", "import not_installed_at_all\n")
    assert words in refused(name)


def test_a_module_that_failed_is_tried_again(write: Write) -> None:
    path = write("mine.py", "1 / 0\n")
    refused("mine.py:Plain")
    path.unlink()
    write("mine.py", ROUTER)
    assert ROUTERS.get("mine.py:Plain").__name__ == "Plain"


def test_an_entry_point_is_a_name(offer: Callable[..., None], write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write("package_of_mine.py", ROUTER)
    monkeypatch.syspath_prepend(Path.cwd())
    offer(("mine", "package_of_mine:Mine"), ("late", "package_that_is_gone:Mine"))
    cls = ROUTERS.get("mine")
    assert cls is ROUTERS.get("mine") is ROUTERS.get("package_of_mine:Mine")
    assert RoutingConfig.model_validate({"router": {"name": "mine", "width": 4}}).router.name == "mine"
    assert "there is no module 'package_that_is_gone'" in refused("late")
    message = refused("mime")
    assert "Did you mean 'mine'?" in message and "top_p, late, mine; or write package.module:Class" in message


def test_entry_points_are_not_looked_at_for_a_built_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise AssertionError("looked")

    monkeypatch.setattr(metadata, "entry_points", fail)
    assert ROUTERS.get("top_k").__name__ == "TopK"


def test_entry_points_may_not_take_a_name(offer: Callable[..., None]) -> None:
    offer(("top_k", "theirs:TopK"))
    assert (
        "the entry point 'top_k' of group moe_testbed.routers (theirs:TopK) has the name of another router (a built-in"
        in refused("theirs")
    )
    offer(("new", "theirs:New"), ("new", "others:New"))
    assert "'new' of group moe_testbed.routers (others:New) has the name of another router (theirs:New)" in refused("x")
    offer(("new", "json:dumps"), ("new", "json:dumps"))
    assert "'new' is no router" in refused("new")


def test_a_balancer_from_outside(write: Write) -> None:
    write("gentle.py", BALANCER)
    balance = {"mine": {"name": "gentle.py:Gentle", "push": 2.0}}
    config = RoutingConfig.model_validate({"router": {"name": "top_k"}, "balance": balance}).balance["mine"]
    assert config.model_dump() == {"name": "gentle.py:Gentle", "push": 2.0}
    with pytest.raises(ValueError, match=r"'gentle\.py:Gentle' is no router"):
        ROUTERS.get("gentle.py:Gentle")


def test_an_experiment_names_a_router_from_outside(experiment: Path, write: Write) -> None:
    write("mine.py", ROUTER)
    name = "routing.router.name=mine.py:Mine"
    without = "routing.balance=none"
    router = load_experiment(experiment, [name, "routing.router.width=7", without]).routing.router
    assert router.model_dump() == {"name": "mine.py:Mine", "width": 7}
    for override, words in {
        "routing.router.wide=7": "unknown key 'routing.router.wide'. Did you mean 'width'?",
        "routing.router.width=0": "routing.router.width is 0: input should be greater than 0",
        "routing.router.name=mine.py:Mime": "command line: routing.router: 'mine.py:Mime': ",
    }.items():
        with pytest.raises(ConfigError) as error:
            load_experiment(experiment, [name, without, override])
        assert words in str(error.value)
