"""`moe-testbed report A B`."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.suites.comparison import COMPARED, compare_suites, open_suites
from moe_testbed.launcher.report.suites.differences import independent_difference
from moe_testbed.launcher.report.suites.words import headlines
from moe_testbed.routing.metrics import gap
from moe_testbed.routing.metrics.bootstrap import Interval
from tests.report.conftest import DEMO, FakeRun, write_suite

MakeSuite = Callable[..., Path]
ROUTERS = ("top_k_global", "top_k_sequence", "hash", "random", "collapsed")
LABELS = ("reference", "permuted_reference", *ROUTERS)


def write(folder: Path, gaps: dict[str, float], **options: Any) -> Path:
    """A suite of the reference, its control and top-k routers with these losses above the domains' difficulty."""
    runs = {"reference": DEMO["reference"], "permuted_reference": DEMO["permuted_reference"]}
    runs |= {label: FakeRun("top_k", gap, 0.4) for label, gap in gaps.items()}
    return write_suite(folder, runs, num_layers=1, sequences_per_domain=8, noise=0.0, **options)


def compare(*folders: Path) -> dict[str, Any]:
    return compare_suites(open_suites(folders))


def by_label(comparison: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {run["label"]: run for run in comparison["runs"]}


def other_data(folder: Path) -> None:
    """Make it a suite of another mix."""
    for path in folder.glob("*/manifest.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "name": "another"}))


def test_values_are_those_of_the_reports_and_differences_are_theirs(make_suite: MakeSuite) -> None:
    folders = [make_suite("small", LABELS, seeds=(1, 2), num_layers=1), make_suite("large", LABELS, seeds=(1, 2))]
    comparison = compare(*folders)
    results = [{run["label"]: run for run in read_results(folder)["runs"]} for folder in folders]
    assert set(by_label(comparison)) == set(LABELS)
    for label, run in by_label(comparison).items():
        for place, content in enumerate(results):
            expected = content[label]
            estimates = run["suites"][place]
            assert estimates["loss"]["value"] == expected["loss"]["mean"]
            assert estimates["recovered"]["value"] == expected["recovered"]["value"]
            for metric in ("domain_information", "normalised_effective_experts"):
                assert estimates[metric]["value"] == expected["routing"]["top_k"][metric]["mean"]
        for metric in COMPARED:
            one, other = (estimates[metric]["value"] for estimates in run["suites"])
            found = run["differences"][0][metric]
            assert found["value"] == pytest.approx(other - one, abs=1e-6)
            assert found["low"] <= found["value"] + 1e-9 and found["value"] <= found["high"] + 1e-9
            assert found["paired"] and found["over"] == "seeds"


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_paired_differences_are_those_of_the_gap(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    folders = [write(tmp_path / name, {"a": 0.1, "b": value}, seeds=seeds) for name, value in (("x", 0.2), ("y", 0.3))]
    found = by_label(compare(*folders))["b"]["differences"][0]["loss"]
    runs = [[read_suite(folder).evaluations("b")[seed] for seed in seeds] for folder in folders]
    one, other = (np.stack([evaluation.sequence_loss_N for evaluation in run]) for run in runs)
    lead = gap.lead(other, one, runs[0][0].sequence_domain_N, runs[0][0].sequence_cluster_N)
    np.testing.assert_allclose([found[key] for key in ("value", "low", "high")], [lead.value, lead.low, lead.high])
    assert found["value"] == pytest.approx(0.1) and found["paired"]


def test_the_difference_of_recovered_is_paired_with_its_ends(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"b": value}) for name, value in (("x", 0.19), ("y", 0.095))]
    found = by_label(compare(*folders))["b"]["differences"][0]["recovered"]
    assert found["value"] == pytest.approx((0.38 - 0.095) / 0.38 - (0.38 - 0.19) / 0.38, abs=0.02)
    assert found["paired"] and found["low"] <= found["value"] <= found["high"]
    assert found["high"] - found["low"] < 0.1


def test_losses_of_different_data_are_not_subtracted(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, {"a": 0.1, "b": 0.2}, seeds=(1, 2)) for name in ("x", "y")]
    other_data(folders[1])
    comparison = compare(*folders)
    found = by_label(comparison)["a"]["differences"][0]
    assert found["loss"]["value"] is None and found["loss"]["reason"] == "losses of different data"
    assert found["recovered"]["value"] is not None and not found["recovered"]["paired"]
    assert any("losses are not subtracted" in verdict.text for verdict in headlines(comparison))


def test_other_sequences_of_the_same_data_are_compared_unpaired(tmp_path: Path) -> None:
    one = write(tmp_path / "x", {"a": 0.1})
    runs = {label: DEMO[label] for label in ("reference", "permuted_reference")} | {"a": FakeRun("top_k", 0.3, 0.4)}
    other = write_suite(tmp_path / "y", runs, num_layers=1, sequences_per_domain=6, noise=0.0)
    comparison = compare(one, other)
    found = by_label(comparison)["a"]
    difference = found["differences"][0]["loss"]
    assert comparison["pairs"][0]["same"] == "data" and not difference["paired"]
    intervals = [
        Interval(*(estimates["loss"][key] for key in ("value", "low", "high", "over"))) for estimates in found["suites"]
    ]
    expected = independent_difference(*intervals)
    np.testing.assert_allclose(
        [difference[key] for key in ("value", "low", "high")], [expected.value, expected.low, expected.high]
    )


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_sequences_of_other_lengths_are_compared_unpaired(tmp_path: Path, section: str) -> None:
    """A training has its length under data; an analysed model of the hub has it under evaluation."""
    folders = [write(tmp_path / name, {"a": gap}) for name, gap in (("x", 0.1), ("y", 0.2))]

    def same(*lengths: int) -> str:
        for folder, length in zip(folders, lengths, strict=True):
            for path in folder.glob("*/config.yaml"):
                config = yaml.safe_load(path.read_text())
                path.write_text(yaml.safe_dump({**config, section: {"sequence_length": length}}))
        return str(compare(*folders)["pairs"][0]["same"])

    assert same(256, 256) == "sequences"
    assert same(256, 512) == "data"


def test_independent_normal_estimates_have_the_normal_interval_of_their_difference() -> None:
    rng = np.random.default_rng(1)
    one, other = 3.0 + 0.3 * rng.standard_normal(200_000), 5.0 + 0.4 * rng.standard_normal(200_000)
    intervals = [Interval(float(v.mean()), *np.percentile(v, [2.5, 97.5]), "seeds") for v in (one, other)]
    found = independent_difference(*intervals)
    np.testing.assert_allclose([found.low, found.high], np.percentile(other - one, [2.5, 97.5]), atol=0.01)
    assert found.value == pytest.approx(2.0, abs=0.01) and found.over == "seeds"


def test_order_of_the_routers(tmp_path: Path) -> None:
    gaps = {"a": 0.05, "b": 0.1, "c": 0.15, "d": 0.2}
    one = write(tmp_path / "x", gaps)
    same = write(tmp_path / "same", {label: 2 * value for label, value in gaps.items()})
    turned = write(tmp_path / "turned", {label: 0.3 - value for label, value in gaps.items()})
    swapped = write(tmp_path / "swapped", {"a": 0.1, "b": 0.05, "c": 0.15, "d": 0.2})
    comparison = compare(one, same, turned, swapped)
    correlations = [pair["ranks"]["loss"]["spearman"] for pair in comparison["pairs"]]
    # Spearman's rho is 1 - 6 sum d^2 / (n (n^2 - 1)); two neighbours swapped: 1 - 6 * 2 / 60.
    assert correlations == pytest.approx([1.0, -1.0, 0.8])
    assert comparison["pairs"][0]["ranks"]["loss"]["runs"] == list("abcd")
    apart = [pair["told_apart"] for pair in comparison["pairs"]]
    assert [found["in_same_order"] for found in apart] == [6, 0, 5]
    assert all(found["pairs"] == found["in_both"] == 6 for found in apart)
    texts = [verdict.text for verdict in headlines(comparison)[::2]]
    assert "holds in same" in texts[0] and "does not hold in turned" in texts[1] and "holds in part" in texts[2]

    few = compare(write(tmp_path / "few", {"a": 0.1, "b": 0.2}), one)
    assert few["pairs"][0]["ranks"]["loss"]["spearman"] is None
    assert "cannot be said" in headlines(few)[0].text
    assert few["unmatched"] == {"few": [], "x": ["c", "d"]}


def test_level_routers_have_no_order(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, dict.fromkeys("abcd", 0.1)) for name in ("x", "y")]
    comparison = compare(*folders)
    assert comparison["pairs"][0]["told_apart"] == {"pairs": 6, "in_both": 0, "in_same_order": 0}
    assert "cannot be told from noise" in headlines(comparison)[0].text


def test_the_command_writes_all_files(make_suite: MakeSuite, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        make_suite("small", LABELS, num_layers=1),
        make_suite("large", (*LABELS, "broken", "dense"), num_layers=1),
    ]
    assert main(["report", *map(str, folders)]) == 0
    out = folders[0].parent / "comparison-small-large"
    printed = capsys.readouterr().out
    assert f"Comparison: {out / 'comparison.html'}" in printed
    assert "Not compared, in large: broken, dense." in printed
    assert "Spearman's rank correlation with large" in printed
    comparison = json.loads((out / "comparison.json").read_text())
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(LABELS) * len(COMPARED) * 3
    losses = {
        (row["run"], row["suite"]): float(row["value"]) for row in rows if row["metric"] == "loss" and not row["less"]
    }
    for run in comparison["runs"]:
        assert [losses[run["label"], name] for name in ("small", "large")] == [
            estimates["loss"]["value"] for estimates in run["suites"]
        ]
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {f"{metric}_1.{suffix}" for metric in COMPARED for suffix in ("svg", "png")}
    page = (out / "comparison.html").read_text()
    assert page.count("<figure") == len(COMPARED) and "alert(1)</script>" not in page

    elsewhere = folders[0].parent / "elsewhere" / "deep"
    assert main(["report", *map(str, folders), "--out", str(elsewhere)]) == 0
    assert (elsewhere / "comparison.json").read_bytes() == (out / "comparison.json").read_bytes()


def test_suites_of_the_same_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write(tmp_path / parent / "suite", {"a": 0.1}) for parent in ("x", "y")]
    assert [suite["name"] for suite in compare(*folders)["suites"]] == [f"suite ({folder})" for folder in folders]


def test_wrong_input_is_one_line(make_suite: MakeSuite, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and not captured.out
        return captured.err

    suite = make_suite("suite", LABELS[:3], num_layers=1)
    assert "is given twice" in complaint(suite, tmp_path / "other" / ".." / "suite")
    assert "is not a suite's folder" in complaint(suite, tmp_path / "nothing")
    disjoint = write_suite(tmp_path / "disjoint", {"alone": DEMO["hash"]})
    assert "no run in common" in complaint(suite, disjoint)
    assert "--out is the folder of a comparison" in complaint(suite, "--out", tmp_path / "out")
