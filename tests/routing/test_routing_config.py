"""What configs may say of routing, and what is answered when they say something else."""

from typing import Any

import pytest
from pydantic import ValidationError

from moe_testbed.routing.balance.balancer import BALANCERS
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.registry import Registry
from moe_testbed.routing.router import ROUTERS
from moe_testbed.routing.scopes import Scope


def parse(router: Any, balance: Any = None) -> RoutingConfig:
    return RoutingConfig.model_validate({"router": router, "balance": balance})


def refused(router: Any, balance: Any = None) -> str:
    with pytest.raises(ValidationError) as error:
        parse(router, balance)
    return str(error.value)


def test_the_catalogue():
    assert set(ROUTERS.names()) >= {
        "cosine",
        "expert_threshold",
        "frozen",
        "group_limited",
        "hash",
        "mlp",
        "noisy_top_k",
        "permuted_reference",
        "random",
        "reference",
        "relu",
        "sigmoid",
        "top_k",
        "top_k_softmax",
        "top_p",
    }
    assert set(BALANCERS.names()) >= {"load_balancing_loss", "loss_free_bias", "z_loss"}


@pytest.mark.parametrize("name", ROUTERS.names())
def test_every_router_is_built_from_its_name_alone(name: str):
    config = parse({"name": name}).router
    assert type(config) is ROUTERS.get(name).Config
    assert config.name == name == type(config).model_validate({}).name


@pytest.mark.parametrize("name", BALANCERS.names())
def test_every_balancer_is_built_from_its_name_alone(name: str):
    needs = BALANCERS.get(name).Config().needs
    router = next(router for router in ROUTERS.names() if needs <= ROUTERS.get(router).Config().provides)
    config = parse({"name": router}, {name: {}}).balance[name]
    assert type(config) is BALANCERS.get(name).Config
    assert config.name == name == type(config).model_validate({}).name


def test_a_resolved_config_loads_back_equal():
    config = parse(
        {"name": "sigmoid", "route_scale": 2.5},
        {"loss_free_bias": {"scope": "sequence"}, "extra": {"name": "load_balancing_loss", "scope": "token"}},
    )
    assert RoutingConfig.model_validate(config.model_dump(mode="json")) == config
    assert RoutingConfig.model_validate_json(config.model_dump_json()) == config


def test_an_unknown_router_names_the_nearest_and_all_others():
    message = refused({"name": "topk"})
    assert "Unknown router 'topk'. Did you mean 'top_k'? Available: " in message
    assert ", ".join(ROUTERS.names()) in message
    assert "Did you mean" not in refused({"name": "zzzzzz"})


def test_a_router_needs_a_name():
    assert f"a router needs a name: one of {', '.join(ROUTERS.names())}" in refused({"normalise": True})
    assert "Unknown router '['top_k']'" in refused({"name": ["top_k"]})


def test_an_unknown_option_is_named():
    message = refused({"name": "top_k", "normalize": True})
    assert "normalize" in message and "Extra inputs are not permitted" in message
    message = refused({"name": "top_k"}, {"load_balancing_loss": {"scopes": "token"}})
    assert "balance.load_balancing_loss.scopes" in message


@pytest.mark.parametrize(
    ("router", "field"),
    [
        ({"name": "sigmoid", "route_scale": 0}, "route_scale"),
        ({"name": "hash", "table": "even"}, "table"),
        ({"name": "reference", "groups": "none"}, "groups"),
        ({"name": "group_limited", "groups": 0}, "groups"),
        ({"name": "group_limited", "groups_kept": 0}, "groups_kept"),
        ({"name": "group_limited", "group_score": "mean"}, "group_score"),
        ({"name": "group_limited", "affinity": "relu"}, "affinity"),
        ({"name": "mlp", "hidden_size": 0}, "hidden_size"),
        ({"name": "cosine", "projection_size": 1}, "projection_size"),
        ({"name": "cosine", "initial_scale": 101}, "initial_scale"),
        ({"name": "top_p", "rate": -0.1}, "rate"),
        ({"name": "expert_threshold", "decay": 1.0}, "decay"),
        ({"name": "permuted_reference", "inside": "random"}, "inside"),
    ],
)
def test_values_out_of_range_are_named(router: dict[str, Any], field: str):
    assert f"router.{field}" in refused(router)


@pytest.mark.parametrize("balance", [None, "none", {}, {"load_balancing_loss": None}])
def test_balance_may_be_none(balance: Any):
    assert parse({"name": "top_k"}, balance).balance == {}


def test_null_takes_one_balancer_out():
    config = parse({"name": "top_k"}, {"load_balancing_loss": None, "z_loss": {}})
    assert list(config.balance) == ["z_loss"]


def test_a_label_may_differ_from_the_name():
    balance = {
        "load_balancing_loss": {"coefficient": 0.01},
        "within_sequences": {"name": "load_balancing_loss", "scope": "sequence", "coefficient": 1e-4},
    }
    config = parse({"name": "top_k"}, balance)
    assert {label: one.name for label, one in config.balance.items()} == dict.fromkeys(balance, "load_balancing_loss")
    scopes = {label: one.scope for label, one in config.balance.items()}  # type: ignore[attr-defined]
    assert scopes == {"load_balancing_loss": Scope.GLOBAL_BATCH, "within_sequences": Scope.SEQUENCE}


def test_an_unknown_balancer_names_the_nearest():
    assert "Unknown balancer 'zloss'. Did you mean 'z_loss'?" in refused({"name": "top_k"}, {"zloss": {}})
    assert "Unknown balancer 'mine'. Available:" in refused({"name": "top_k"}, {"mine": {"coefficient": 1.0}})


def test_balance_must_be_a_mapping():
    message = refused({"name": "top_k"}, ["z_loss"])
    assert f"expected a mapping of balancers ({', '.join(BALANCERS.names())}) or none, got ['z_loss']" in message


@pytest.mark.parametrize(
    "router",
    [
        {"name": "hash"},
        {"name": "random"},
        {"name": "reference", "inside": "hash"},
        {"name": "permuted_reference", "inside": "all"},
    ],
)
def test_a_router_without_scores_cannot_be_balanced(router: dict[str, Any]):
    message = refused(router, {"z_loss": {}, "loss_free_bias": {}})
    assert f"z_loss (z_loss) needs scores of all experts, which the router '{router['name']}' does not have" in message
    assert "or routing.balance: none" in message
    assert parse(router, "none").router.name == router["name"]


@pytest.mark.parametrize(
    ("router", "balancer", "missing"),
    [
        ("top_p", "loss_free_bias", "a selection that takes a bias"),
        ("relu", "loss_free_bias", "a selection that takes a bias"),
        ("expert_threshold", "loss_free_bias", "a selection that takes a bias"),
        ("top_k", "load", "noise in its scores"),
        ("top_k", "l1_sparsity", "gates that are the positive part of its scores"),
    ],
)
def test_a_router_is_balanced_by_what_it_provides(router: str, balancer: str, missing: str):
    assert f"needs {missing}, which the router '{router}' does not have" in refused({"name": router}, {balancer: {}})


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        parse({"name": "top_k"}).router.normalise = False  # type: ignore[attr-defined]


def test_a_name_is_given_once():
    registry: Registry[object] = Registry("thing")
    registry.register("one")(int)
    assert registry.get("one") is int and registry.names() == ["one"]
    with pytest.raises(ValueError, match="thing 'one' is registered twice"):
        registry.register("one")(str)
