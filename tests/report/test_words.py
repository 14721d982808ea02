"""What a verdict says of a run, for numbers that leave no doubt and for numbers that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.report.definitions import DEFINITIONS
from moe_testbed.launcher.report.extra_tables import extra_tables
from moe_testbed.launcher.report.numbers_routing import METRICS
from moe_testbed.launcher.report.results import read_results
from moe_testbed.launcher.report.words import number, verdict

MakeSuite = Callable[..., Path]


@pytest.fixture
def results(make_suite: MakeSuite) -> dict[str, Any]:
    return read_results(make_suite(labels=("reference", "permuted_reference", "top_k_global", "sigmoid_bias", "dense")))


def said(results: dict[str, Any], label: str) -> str:
    (run,) = [run for run in results["runs"] if run["label"] == label]
    return verdict(run, results).text


def run(results: dict[str, Any], label: str) -> dict[str, Any]:
    (found,) = [run for run in results["runs"] if run["label"] == label]
    return dict(found)


def test_a_verdict_answers_the_questions_in_order(results: dict[str, Any]) -> None:
    text = said(results, "top_k_global")
    parts = (
        "recovers ",
        " of the reference's lead",
        "Its experts specialise moderately (domain information 0.3",
        "and are used evenly",
        "Forced to other domains' experts the loss rises by 0.57 [0.57, 0.57] nats per token, kept to its own domain's "
        "it changes by 0.02 [0.02, 0.02].",
        "of the damage falls on the domain that it serves most (12 % if all domains suffered alike).",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "Its experts" not in said(results, "dense") and "Forced" not in said(results, "dense")


def test_what_is_within_noise_is_called_so(results: dict[str, Any]) -> None:
    chosen = run(results, "top_k_global")
    chosen["causes"]["forced_elsewhere"] |= {"mean": 0.1, "low": -0.05, "high": 0.2}
    chosen["causes"]["specificity"] |= {"mean": 0.2, "low": 0.1, "high": 0.3}
    chosen["routing"]["top_k"]["domain_information_above_shuffled"] |= {"mean": 0.05, "low": -0.01}
    text = verdict(chosen, results).text
    assert "the loss changes by 0.10 [−0.05, 0.20] nats per token, within noise" in text
    assert "(12 % if all domains suffered alike; within noise)" in text
    assert "specialise weakly (domain information " in text and ", within noise of shuffled labels)" in text


def test_the_cost_is_what_differs(results: dict[str, Any]) -> None:
    assert "Cost: 7.4 % of its assignments dropped." in said(results, "sigmoid_bias")
    assert "Cost" not in said(results, "top_k_global")
    chosen = run(results, "top_k_global")
    chosen["tokens_per_second"]["mean"] = 0.5 * max(r["tokens_per_second"]["mean"] for r in results["runs"])
    chosen["active_parameters"]["mean"] *= 1.25
    text = verdict(chosen, results).text
    assert "Cost: 50 % of the fastest run's tokens/s (as trained here: compare loosely); 25 % more active" in text


def test_a_number_that_is_rounded_to_0_has_no_sign() -> None:
    assert [number(value, 2) for value in (-0.001, 0.0, -0.01, -1234.0)] == ["0.00", "0.00", "−0.01", "−1,234.00"]
    assert [number(value, 1, signed=True) for value in (0.04, -0.04, 0.05, -2.0)] == ["0.0", "0.0", "+0.1", "−2.0"]


def test_everything_shown_is_defined(results: dict[str, Any]) -> None:
    keys, names = {d.key for d in DEFINITIONS}, {d.name for d in DEFINITIONS}
    assert len(keys) == len(DEFINITIONS) and len(names) == len(DEFINITIONS)
    assert set(METRICS) <= keys
    for table in extra_tables(results):
        columns = {column for column in table.columns[1:] if not column.startswith("MoE layer")}
        assert columns <= names
    chosen = run(results, "top_k_global")
    for part in ("agreement", "router_measures", "coactivation", "vocabulary", "redundancy", "causes"):
        stats = {name for name, stat in chosen[part].items() if isinstance(stat, dict) and "mean" in stat}
        assert stats <= keys
    assert set(chosen["over_training"]["curves"]) <= keys
