"""What a verdict says of a run, for numbers that leave no doubt and for numbers that do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.page.definitions import DEFINITIONS
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.words import headlines, number, verdict

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
        "Without an expert 48 % [48, 48] of the damage falls on the domain that it serves most, which sends it 6",
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
    assert " % of its tokens: within noise." in text
    assert "specialise weakly (domain information " in text and ", within noise of shuffled labels)" in text


def test_specificity_is_compared_with_what_the_domain_sends(results: dict[str, Any]) -> None:
    chosen = run(results, "top_k_global")
    chosen["routing"]["top_k"]["purity"]["mean"] = 0.6
    chosen["causes"]["specificity"] |= {"mean": 0.71, "low": 0.65, "high": 0.8}
    sentence = (
        "Without an expert 71 % [65, 80] of the damage falls on the domain that it serves most, which sends it 60 %"
    )
    assert f"{sentence} of its tokens." in verdict(chosen, results).text
    chosen["causes"]["specificity"]["low"] = 0.55
    assert " of its tokens: within noise." in verdict(chosen, results).text
    # The reference's experts see nothing but their domain: there is no more to be had.
    assert "which sends it 100 % of its tokens." in said(results, "reference")


def test_only_routers_that_choose_again_are_called_forced(make_suite: MakeSuite) -> None:
    labels = ("reference", "reference_hash", "permuted_reference", "top_k_global", "hash", "random")
    results = read_results(make_suite("forced", labels=labels, reference=labels[:2]))
    run(results, "reference_hash")["router_measures"] = None
    assert all(run(results, label)["causes"]["forced_elsewhere"] is not None for label in labels)
    forced = [label for label in labels if "Forced" in said(results, label)]
    assert forced == ["reference", "reference_hash", "top_k_global"]


@pytest.mark.parametrize(
    ("seeds", "tone", "start", "noise"),
    [
        ((1,), "caution", "In this one seed reference leads top_k_global", "(one seed: the noise of training is not"),
        ((1, 2, 3), "good", "The reference wins: reference leads", "over 3 seeds."),
        ((1, 2, 3, 4), "good", "The reference wins: reference leads", "over 4 seeds, too few for its 95 %."),
        ((1, 2, 3, 4, 5, 6), "good", "The reference wins: reference leads", ", 95 % interval ["),
    ],
)
def test_a_win_is_as_sure_as_its_seeds(
    make_suite: MakeSuite, seeds: tuple[int, ...], tone: str, start: str, noise: str
) -> None:
    labels = ("reference", "permuted_reference", "top_k_global")
    suite = make_suite("seeds", labels=labels, seeds=seeds, noise=0.0, num_layers=1, recorded=False)
    (line, lead) = headlines(read_results(suite))
    assert line.tone == tone and line.text.startswith(start) and noise in line.text
    assert ("95 % interval" in line.text + lead.text) == (len(seeds) in (1, 6))
    assert ("range [" in line.text and "range [" in lead.text) == (len(seeds) == 3)


def test_seeds_are_those_that_both_runs_finished(make_suite: MakeSuite) -> None:
    labels = ("reference", "permuted_reference", "top_k_global")
    suite = make_suite("some", labels=labels, seeds=(1, 2, 3), noise=0.0, num_layers=1, recorded=False)
    (suite / "top_k_global-seed2" / "status.json").unlink()
    against, lead = headlines(read_results(suite))
    assert "over 2 seeds" in against.text and "over 3 seeds" in lead.text


def test_layers_that_a_run_does_not_have_are_no_layers_that_never_settled(results: dict[str, Any]) -> None:
    settled = run(results, "reference")["over_training"]["settled_step"]
    del settled["layers"][1:]
    (table,) = [table for table in extra_tables(results) if table.section == "training"]
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["reference"] == ["not before the end", "–"]
    assert rows["top_k_global"] == ["not before the end"] * 2
    assert len(settled["layers"]) == 1


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
    keys, names = {d.metric.name for d in DEFINITIONS}, {d.metric.column_title for d in DEFINITIONS}
    titles = {d.metric.title for d in DEFINITIONS}
    assert len(keys) == len(DEFINITIONS) and len(titles) == len(DEFINITIONS)
    assert set(run(results, "top_k_global")["routing"]["top_k"]) <= keys
    for table in extra_tables(results):
        columns = {column for column in table.columns[1:] if not column.startswith("MoE layer")}
        assert columns <= names
    chosen = run(results, "top_k_global")
    for part in ("agreement", "router_measures", "coactivation", "vocabulary", "redundancy", "causes"):
        stats = {name for name, stat in chosen[part].items() if isinstance(stat, dict) and "mean" in stat}
        assert stats <= keys
    assert set(chosen["over_training"]["curves"]) <= keys
