"""results.json and results.csv of suites whose right answers are known."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.numbers.results import ranked, read_results
from moe_testbed.launcher.report.numbers.results_csv import results_csv
from moe_testbed.launcher.run.suite_folder import SuiteFolder

MakeSuite = Callable[..., Path]
LABELS = ("reference", "permuted_reference", "top_k_global", "dense")


def by_label(results: dict[str, Any]) -> dict[str, Any]:
    return {run["label"]: run for run in results["runs"]}


def edit_evaluation(folder: Path, **changes: object) -> None:
    path = next((folder / "evaluations").glob("*.npz"))
    with np.load(path) as arrays:
        content = {**{name: arrays[name] for name in arrays.files}, **changes}
    np.savez(path, **content)


def test_losses_and_gap_of_a_constructed_suite(make_suite: MakeSuite) -> None:
    results = read_results(make_suite(noise=0.0, num_layers=1, reference=("reference", "reference_hash")))
    runs = by_label(results)
    base = np.mean([2.9, 3.4, 3.1, 3.6, 2.6, 2.4, 3.9, 2.2])
    assert results["reference"]["best"] == "reference_hash"
    assert runs["top_k_global"]["loss"]["mean"] == pytest.approx(base + 0.06)
    assert runs["top_k_global"]["perplexity"]["mean"] == pytest.approx(math.exp(base + 0.06))
    assert runs["top_k_global"]["loss_by_domain"]["chinese"]["mean"] == pytest.approx(3.66)
    assert results["reference"]["lead_over_control"]["value"] == pytest.approx(0.41)
    for label, gap in (("reference_hash", -0.03), ("top_k_global", 0.06), ("random", 0.45), ("dense", 0.22)):
        assert runs[label]["recovered"]["value"] == pytest.approx((0.38 - gap) / 0.41), label
        assert runs[label]["recovered_by_domain"]["music"]["value"] == pytest.approx((0.38 - gap) / 0.41), label
    assert results["reference"]["lead_over_best_other"]["label"] == "hash"
    assert results["reference"]["lead_over_best_learned"] == pytest.approx(
        {**results["reference"]["lead_over_best_learned"], "label": "top_k_global", "value": 0.09}
    )


def test_roles_and_a_run_that_is_not_causal_is_no_rival(make_suite: MakeSuite) -> None:
    runs = by_label(read_results(make_suite()))
    roles = {label: run["role"] for label, run in runs.items()}
    assert roles["reference"] == "reference"
    assert roles["permuted_reference"] == "control"
    assert roles["top_k_global"] == roles["broken"] == "learned"
    assert roles["hash"] == roles["random"] == roles["dense"] == "fixed"
    assert roles["late"] == "unknown"
    assert not runs["expert_choice"]["causal"]


def test_routing_metrics_are_per_layer_and_averaged(make_suite: MakeSuite) -> None:
    runs = by_label(read_results(make_suite(labels=LABELS, num_layers=3)))
    for form in ("top_1", "top_k"):
        stat = runs["top_k_global"]["routing"][form]["domain_information"]
        assert len(stat["layers"]) == 3
        assert stat["mean"] == pytest.approx(np.mean([layer["mean"] for layer in stat["layers"]]))
    top_k = runs["reference"]["routing"]["top_k"]
    assert top_k["domain_information"]["mean"] == pytest.approx(1)
    assert top_k["domain_information_shuffled"]["mean"] < 0.02
    assert top_k["domain_information_above_shuffled"]["mean"] == pytest.approx(
        1 - top_k["domain_information_shuffled"]["mean"]
    )
    assert runs["dense"]["routing"]["top_k"]["purity"] == {"mean": None, "spread": None, "seeds": 1, "layers": []}


def test_dropped_assignments_have_a_form_of_their_own(make_suite: MakeSuite) -> None:
    runs = by_label(read_results(make_suite()))
    assert runs["sigmoid_bias"]["drop_rate"]["mean"] == pytest.approx((0.4 + 7 * 0.03) / 8, abs=0.005)
    assert "top_k_kept" in runs["sigmoid_bias"]["routing"]
    assert runs["reference"]["drop_rate"]["mean"] == 0
    assert "top_k_kept" not in runs["reference"]["routing"]


def test_experts_per_token_are_assignments_over_tokens(make_suite: MakeSuite) -> None:
    folder = make_suite()
    (run,) = [run for run in read_results(folder)["runs"] if run["label"] == "reference"]
    layers = []
    for path in sorted(folder.glob("reference-seed*/evaluations/step_*400.npz")):
        with np.load(path) as arrays:
            layers.append([counts_DE.sum() / arrays["tokens_D"].sum() for counts_DE in arrays["counts_top_k_YDE"]])
    expected = np.mean(layers, axis=0)
    assert [stat["mean"] for stat in run["experts_per_token"]["layers"]] == pytest.approx(expected)
    assert run["experts_per_token"]["mean"] == pytest.approx(expected.mean())


def test_drop_rates_are_told_by_domain(make_suite: MakeSuite) -> None:
    runs = by_label(read_results(make_suite()))
    by_domain = runs["sigmoid_bias"]["drop_rate_by_domain"]
    assert by_domain["legal_english"]["mean"] == pytest.approx(0.4, abs=0.005)
    others = [stat["mean"] for domain, stat in by_domain.items() if domain != "legal_english"]
    assert others == pytest.approx([0.03] * 7, abs=0.005)
    assert len(by_domain["music"]["layers"]) == 2
    overall = np.mean([stat["mean"] for stat in by_domain.values()])
    assert runs["sigmoid_bias"]["drop_rate"]["mean"] == pytest.approx(overall)
    assert {stat["mean"] for stat in runs["reference"]["drop_rate_by_domain"].values()} == {0}
    assert runs["dense"]["drop_rate_by_domain"]["music"]["mean"] is None


def test_spread_over_seeds(make_suite: MakeSuite) -> None:
    results = read_results(make_suite(labels=LABELS, seeds=(1, 2, 5)))
    run = by_label(results)["top_k_global"]
    losses = [training["loss"] for training in run["trainings"]]
    assert run["loss"]["seeds"] == 3
    assert run["loss"]["mean"] == pytest.approx(np.mean(losses))
    assert run["loss"]["spread"] == pytest.approx(np.std(losses, ddof=1))
    assert run["recovered"]["over"] == "seeds"
    single = by_label(read_results(make_suite("single")))["top_k_global"]
    assert single["loss"]["spread"] is None
    assert single["recovered"]["over"] == single["loss"]["over"] == "documents"
    old = by_label(read_results(make_suite("old", recorded=False)))["top_k_global"]
    assert old["recovered"]["over"] == "evaluation sequences"


def test_unfinished_runs_stay_with_their_reason(make_suite: MakeSuite) -> None:
    suite = make_suite(seeds=(1, 2))
    (suite / "hash-seed2" / "status.json").write_text('{"state": "running", "step": 7, "steps": 400, "reason": null}')
    next((suite / "random-seed1" / "evaluations").glob("*")).write_bytes(b"PK\x03\x04half")
    edit_evaluation(suite / "dense-seed1", step=300)
    edit_evaluation(suite / "collapsed-seed1", domains=np.array(list("abcdefgh")))
    runs = by_label(read_results(suite))
    reasons = {
        (run["label"], training["seed"]): training["reason"]
        for run in runs.values()
        for training in run["trainings"]
        if training["loss"] is None
    }
    assert reasons["hash", 2] == "cut off at step 7 of 400"
    assert reasons["late", 1] == "not started"
    assert "nan at step 220" in reasons["broken", 1]
    assert "its evaluation cannot be used" in reasons["random", 1]
    assert "the last one is of step 300, the training ended at 400" in reasons["dense", 1]
    assert "other domains" in reasons["collapsed", 1]
    assert runs["hash"]["loss"]["seeds"] == 1
    assert runs["hash"]["recovered"]["over"] == "documents"
    assert runs["late"]["loss"] == {"mean": None, "spread": None, "seeds": 0}
    assert runs["late"]["recovered"]["undefined"] == "no run finished"


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("permuted_reference", "no run of the control finished"),
        ("reference", "no run of the reference finished"),
        (None, "does not lead its control"),
    ],
)
def test_recovered_is_undefined_without_a_lead(make_suite: MakeSuite, broken: str | None, reason: str) -> None:
    suite = make_suite()
    if broken:
        (suite / f"{broken}-seed1" / "status.json").unlink()
    else:
        (suite / "reference-seed1").rename(suite / "aside")
        (suite / "permuted_reference-seed1").rename(suite / "reference-seed1")
        (suite / "aside").rename(suite / "permuted_reference-seed1")
    share = by_label(read_results(suite))["top_k_global"]["recovered"]
    assert share["value"] is None
    assert reason in share["undefined"]


def test_a_diverged_run_does_not_spoil_the_others(make_suite: MakeSuite) -> None:
    suite = make_suite(reference=("reference", "reference_hash"))
    edit_evaluation(suite / "hash-seed1", loss_sum_D=np.full(8, np.nan), sequence_loss_N=np.full(128, np.nan))
    results = read_results(suite)
    runs = by_label(results)
    assert runs["hash"]["loss"]["mean"] is None
    assert "not finite" in runs["hash"]["recovered"]["undefined"]
    assert runs["top_k_global"]["recovered"]["value"] is not None
    assert results["reference"]["lead_over_best_other"]["label"] == "top_k_global"
    json.dumps(results, allow_nan=False)


def test_the_reference_comes_first_and_the_rest_by_loss(make_suite: MakeSuite) -> None:
    order = [run["label"] for run in ranked(read_results(make_suite(noise=0.0, num_layers=1)))]
    assert order[:3] == ["reference", "reference_hash", "hash"]
    assert order[-2:] == ["broken", "late"]


def test_files_hold_the_same_numbers_and_the_same_bytes_each_time(
    make_suite: MakeSuite, forget: Callable[[], None]
) -> None:
    suite = make_suite(seeds=(1, 2))
    results = read_results(suite)
    folder, json_path, csv_path = SuiteFolder(suite), suite / "results.json", suite / "results.csv"
    folder.write_results(results, results_csv(results))
    written = json_path.read_bytes(), csv_path.read_bytes()
    forget()
    again = read_results(suite)
    folder.write_results(again, results_csv(again))
    assert (json_path.read_bytes(), csv_path.read_bytes()) == written
    assert not list(suite.glob(".*.tmp"))

    def means(value: Any) -> Iterator[float]:
        """The numbers with a mean or a value; the curves over training, which are lists, have no rows."""
        if isinstance(value, dict):
            yield from [value[key] for key in ("mean", "value") if isinstance(value.get(key), float)]
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from means(item)

    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted(float(row["mean"]) for row in rows if row["mean"]) == sorted(
        number
        for run in results["runs"]
        for name, part in run.items()
        if name != "over_training"
        for number in means(part)
    )
    layers = [r for r in rows if (r["run"], r["quantity"], r["form"]) == ("hash", "purity", "top_1")]
    assert [row["moe_layer"] for row in layers] == ["mean", "0", "1"]
    share = by_label(results)["hash"]["recovered_by_domain"]["music"]
    (row,) = [r for r in rows if (r["run"], r["quantity"], r["domain"]) == ("hash", "recovered", "music")]
    assert (float(row["mean"]), float(row["low"]), row["over"]) == (share["value"], share["low"], "seeds")


def test_a_folder_that_is_no_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not a suite's folder: suite\.yaml cannot be read"):
        read_results(tmp_path)
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"name": "empty"}))
    with pytest.raises(ValueError, match="names no runs"):
        read_results(tmp_path)
