"""Routers of other people that were written before names changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tests.routing.cases import hidden_states, make_context, make_router


def test_a_router_with_the_former_names_of_shapes_goes_on_working(tmp_path: Path) -> None:
    file = tmp_path / "former.py"
    file.write_text(
        "from moe_testbed.routing.router import Scores\n"
        "from moe_testbed.routing.routers.top_k import TopK\n\n\n"
        "class Former(TopK):\n"
        "    def score(self, x_TD, context):\n"
        "        return Scores.by_softmax(2.0 * self.scorer(x_TD))\n\n"
        "    def vectors_ED(self):\n"
        "        return -self.scorer.weight\n"
    )
    router = make_router((f"{file}:Former", {}))
    decision = router(hidden_states(make_context()), make_context())
    assert decision.vectors_EX is not None
    torch.testing.assert_close(decision.logits_TE, -2.0 * hidden_states(make_context()) @ decision.vectors_EX.T)


def test_a_router_written_after_the_published_example_of_before_loads(tmp_path: Path) -> None:
    example = (Path(__file__).resolve().parents[2] / "configs" / "examples" / "nearest_vector.py").read_text()
    former = example.replace("routing.learned import gathered", "routing.weight import gathered").replace(
        "x_TM", "x_TD"
    )
    assert former != example
    (tmp_path / "nearest.py").write_text(former)
    router = make_router((f"{tmp_path / 'nearest.py'}:NearestVector", {}))
    assert router(hidden_states(make_context()), make_context()).weights_TK.requires_grad


def test_a_router_may_call_its_base_and_build_its_decision_by_the_former_names(tmp_path: Path) -> None:
    file = tmp_path / "former.py"
    file.write_text(
        "from moe_testbed.routing.records import RoutingDecision\n"
        "from moe_testbed.routing.routers.top_k import TopK\n\n\n"
        "class Former(TopK):\n"
        "    def vectors_ED(self):\n"
        "        return -super().vectors_ED()\n\n"
        "    def forward(self, x_TD, context):\n"
        "        d = super().forward(x_TD, context)\n"
        "        return RoutingDecision(\n"
        "            expert_ids_TK=d.expert_ids_TK, weights_TK=d.weights_TK, probabilities_TE=d.probabilities_TE,\n"
        "            logits_TE=d.logits_TE, vectors_ED=2.0 * d.vectors_ED, noise=d.noise,\n"
        "        )\n"
    )
    router = make_router((f"{file}:Former", {}))
    decision = router(hidden_states(make_context()), make_context())
    torch.testing.assert_close(decision.vectors_EX, -2.0 * router.scorer.weight)
    assert replace(decision, noise=None).vectors_ED is decision.vectors_EX
    assert replace(decision, vectors_EX=None).vectors_ED is None
    assert make_router(("top_k", {})).vectors_ED() is not None
