"""The guard on decisions: what a router may return, and what is said of anything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_testbed.routing.errors import RouterError
from moe_testbed.routing.guard import check_decision
from moe_testbed.routing.records import RoutingDecision
from moe_testbed.routing.router import Capability, RouterConfig

E, K, T = 6, 2, 5


class Varying(RouterConfig):
    @property
    def varying_top_k(self) -> bool:
        return True


class WithoutScores(RouterConfig):
    @property
    def provides(self) -> frozenset[Capability]:
        return frozenset()


def decision(**changes: Any) -> RoutingDecision:
    """A good one, changed."""
    logits_TE = torch.linspace(-3, 3, T * E).view(T, E)
    probabilities_TE = logits_TE.softmax(-1)
    weights_TK, expert_ids_TK = probabilities_TE.topk(K)
    return replace(RoutingDecision(expert_ids_TK, weights_TK, probabilities_TE, logits_TE), **changes)


def check(checked: Any, config: type[RouterConfig] = RouterConfig) -> None:
    check_decision(checked, E, K, T, config(name="mine"), layer=3, step=17)


def filled(value: float, *shape: int, at: int = 0) -> torch.Tensor:
    tensor = torch.full(shape, 1.0 / E)
    tensor.view(-1)[at] = value
    return tensor


def ids(value: int, width: int = K) -> torch.Tensor:
    tensor = torch.arange(width).repeat(T, 1)
    tensor[2, 1] = value
    return tensor


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_good_decision_passes(dtype: torch.dtype) -> None:
    good = decision()
    check(replace(good, weights_TK=good.weights_TK.to(dtype).requires_grad_()))


def test_a_barred_expert_may_have_minus_infinity() -> None:
    check(decision(logits_TE=filled(-INF, T, E)))
    check(decision(logits_TE=torch.full((T, E), -INF)))


def test_values_whose_sum_overflows_are_finite_all_the_same() -> None:
    check(decision(weights_TK=torch.full((T, K), 3e38)))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_varying_number_of_experts(width: int) -> None:
    ids_TW = torch.arange(width).repeat(T, 1)
    ids_TW[0, 0] = -1
    check(decision(expert_ids_TK=ids_TW, weights_TK=torch.zeros(T, width)), Varying)


def test_a_router_without_scores() -> None:
    check(decision(probabilities_TE=None, logits_TE=None), WithoutScores)


WRONG = [
    (None, RouterConfig, "returned a NoneType; return a RoutingDecision"),
    ({"expert_ids_TK": [[0, 1]]}, RouterConfig, "returned expert_ids_TK as list; return a tensor"),
    ({"weights_TK": None}, RouterConfig, "returned weights_TK as NoneType; return a tensor"),
    (
        {"expert_ids_TK": ids(3).int()},
        RouterConfig,
        "returned expert_ids_TK of torch.int32; only torch.int64 is allowed: convert them with .long()",
    ),
    (
        {"expert_ids_TK": ids(3)[:3]},
        RouterConfig,
        "returned expert_ids_TK of shape [3, 2] for 5 tokens; one row per token is allowed: return [5, 2]",
    ),
    ({"expert_ids_TK": ids(3).view(-1)}, RouterConfig, "returned expert_ids_TK of shape [10] for 5 tokens"),
    ({"expert_ids_TK": ids(3)[:, :0]}, Varying, "returned expert_ids_TK of shape [5, 0] for 5 tokens"),
    (
        {"expert_ids_TK": ids(3, 3), "weights_TK": torch.ones(T, 3)},
        RouterConfig,
        "returned 3 experts per token where model.moe.top_k is 2; return [5, 2], or let varying_top_k of its Config be",
    ),
    (
        {"weights_TK": torch.ones(T, 3)},
        RouterConfig,
        "returned weights_TK of torch.float32 and shape [5, 3]; only floating numbers in the shape of expert_ids_TK, "
        "[5, 2], are allowed",
    ),
    ({"weights_TK": torch.ones(T, K).long()}, RouterConfig, "returned weights_TK of torch.int64 and shape [5, 2]"),
    (
        {"probabilities_TE": None},
        RouterConfig,
        "returned no probabilities_TE, though its Config provides scores (Capability.SCORES); mend one of them",
    ),
    ({"logits_TE": None}, RouterConfig, "returned no logits_TE, though its Config provides scores"),
    ({}, WithoutScores, "returned probabilities_TE, though its Config does not provide scores"),
    (
        {"probabilities_TE": torch.ones(T, E + 1)},
        RouterConfig,
        "returned probabilities_TE of torch.float32 and shape [5, 7]; only floating numbers of shape [5, 6] (tokens, "
        "experts) are allowed",
    ),
    ({"logits_TE": torch.ones(T, E).int()}, RouterConfig, "returned logits_TE of torch.int32 and shape [5, 6]"),
    (
        {"expert_ids_TK": ids(6)},
        RouterConfig,
        "returned expert 6; only 0 to 5 are allowed: choose among model.moe.num_experts = 6",
    ),
    ({"expert_ids_TK": ids(-2)}, Varying, "returned expert -2; only 0 to 5, and -1 for none, are allowed"),
    (
        {"expert_ids_TK": torch.full((T, K), 9)},
        RouterConfig,
        "returned expert 9 and 9 more like it; only 0 to 5 are allowed",
    ),
    (
        {"expert_ids_TK": ids(-1)},
        RouterConfig,
        "returned expert -1; only 0 to 5 are allowed: choose among model.moe.num_experts = 6, or let varying_top_k of",
    ),
    (
        {"weights_TK": filled(NAN, T, K, at=7)},
        RouterConfig,
        "returned 1 NaN or infinite weights_TK of 10; only finite numbers are allowed: lower training.learning_rate",
    ),
    ({"weights_TK": filled(-INF, T, K)}, RouterConfig, "returned 1 NaN or infinite weights_TK of 10"),
    ({"weights_TK": torch.tensor([[INF, -INF]] * T)}, RouterConfig, "returned 10 NaN or infinite weights_TK of 10"),
    (
        {"probabilities_TE": filled(NAN, T, E)},
        RouterConfig,
        "returned 1 NaN or infinite probabilities_TE of 30; only finite numbers are allowed",
    ),
    ({"logits_TE": filled(NAN, T, E, at=29)}, RouterConfig, "returned 1 NaN or positive infinite logits_TE of 30"),
    ({"logits_TE": filled(INF, T, E)}, RouterConfig, "returned 1 NaN or positive infinite logits_TE of 30"),
]


@pytest.mark.parametrize(("changes", "config", "words"), WRONG, ids=range(len(WRONG)))
def test_anything_else_is_stopped(changes: dict[str, Any] | None, config: type[RouterConfig], words: str) -> None:
    with pytest.raises(RouterError) as error:
        check(changes if changes is None else decision(**changes), config)
    assert str(error.value).startswith(f"router 'mine' in MoE layer 3 at step 17 {words}")


def test_the_check_leaves_the_graph_alone() -> None:
    good = decision()
    weights_TK = good.weights_TK.clone().requires_grad_()
    check(replace(good, weights_TK=weights_TK))
    weights_TK.sum().backward()
    assert weights_TK.grad is not None and torch.equal(weights_TK.grad, torch.ones(T, K))
