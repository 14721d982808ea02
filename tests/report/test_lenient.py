"""Broken and odd run folders: a line for each, and a report of the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.figures.figures import draw_all
from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.extra_tables import extra_tables
from moe_testbed.launcher.report.words import failures, headlines, verdict

MakeSuite = Callable[..., Path]

LABELS = ("reference", "permuted_reference", "top_k_global")


def report(suite_dir: Path) -> dict[str, Any]:
    """Everything that the page is made of, made; returns the results."""
    suite = read_suite(suite_dir)
    results = summarise(suite)
    draw_all(suite, results)
    extra_tables(results)
    headlines(results)
    for run in results["runs"]:
        verdict(run, results)
    return results


def edit(path: Path, **changes: object) -> None:
    """Change arrays of an .npz file; None removes one."""
    with np.load(path) as arrays:
        content = {**{name: arrays[name] for name in arrays.files}, **changes}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def evaluation(suite: Path, label: str = "top_k_global") -> Path:
    return next((suite / f"{label}-seed1" / "evaluations").glob("*"))


@pytest.fixture
def suite(make_suite: MakeSuite) -> Path:
    return make_suite(labels=LABELS)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04half", b"no arrays"])
def test_a_damaged_analysis_costs_itself_and_a_line(suite: Path, content: bytes) -> None:
    (suite / "top_k_global-seed1" / "analysis.npz").write_bytes(content)
    results = report(suite)
    (note,) = results["notes"]
    assert note.startswith("top_k_global, seed 1: analysis.npz cannot be used: ") and "\n" not in note
    causes = {run["label"]: run["causes"] for run in results["runs"]}
    assert causes["top_k_global"] is None and causes["reference"] is not None


def test_damaged_statistics_are_left_out_and_told(suite: Path) -> None:
    folder = suite / "top_k_global-seed1" / "statistics"
    (folder / "step_00000100.npz").write_bytes(b"")
    edit(folder / "step_00000200.npz", expert_ids_YTW=None)
    edit(folder / "step_00000300.npz", expert_ids_YTW=np.zeros((1, 3, 2)))
    for path in (suite / "reference-seed1" / "statistics").glob("*"):
        path.write_bytes(b"PK")
    results = report(suite)
    assert results["notes"] == [
        "reference, seed 1: none of its 8 statistics files can be used",
        "top_k_global, seed 1: 3 of 8 statistics files left out: step_00000100.npz cannot be read (File is not a "
        "zip file)",
    ]
    runs = {run["label"]: run for run in results["runs"]}
    assert runs["reference"]["over_training"] is None
    assert runs["top_k_global"]["over_training"]["steps"] == [50, 150, 250, 350, 400]


def test_statistics_after_the_last_step_are_of_a_training_that_went_further(suite: Path) -> None:
    folder = suite / "top_k_global-seed1" / "statistics"
    (folder / "step_00000400.npz").rename(folder / "step_00000999.npz")
    (run,) = [run for run in report(suite)["runs"] if run["label"] == "top_k_global"]
    assert run["over_training"]["steps"][-1] == 350


def test_an_array_that_does_not_fit_is_left_out_and_told(suite: Path) -> None:
    edit(evaluation(suite), router_cosine_YEE=np.ones((1, 32, 32)), weight_YDE=np.ones((2, 8, 5)))
    edit(suite / "top_k_global-seed1" / "analysis.npz", forced_loss_DN=np.ones((3, 16)))
    results = report(suite)
    start = "top_k_global, seed 1: left out of"
    assert results["notes"] == [
        f"{start} its evaluation: weight_YDE has shape (2, 8, 5) instead of 2 Y x 8 D x 32 E",
        f"{start} its evaluation: router_cosine_YEE has shape (1, 32, 32) instead of 2 Y x 32 E x 32 E",
        f"{start} analysis.npz: forced_loss_DN has shape (3, 16) instead of 8 D x 16 N",
    ]
    (run,) = [run for run in results["runs"] if run["label"] == "top_k_global"]
    assert run["router_measures"]["router_cosine"] is None
    assert run["router_measures"]["mean_margin"] is not None
    assert run["causes"]["forced_elsewhere"] is None and run["causes"]["specificity"] is not None


def test_a_missing_layer_makes_an_evaluation_unusable(suite: Path) -> None:
    with np.load(evaluation(suite)) as arrays:
        dropped_YDE = arrays["dropped_YDE"]
    edit(evaluation(suite), dropped_YDE=dropped_YDE[:1])
    line = failures(report(suite)["runs"])
    assert line == [
        "top_k_global, seed 1: failed at step 400 of 400: its evaluation cannot be used: dropped_YDE has shape "
        "(1, 8, 32) instead of 2 Y x 8 D x 32 E"
    ]


def test_seeds_of_other_sizes_are_not_averaged(make_suite: MakeSuite, tmp_path: Path) -> None:
    suite = make_suite(labels=LABELS, seeds=(1, 2))
    other = make_suite("other", labels=LABELS, seeds=(1, 2), num_layers=1)
    (suite / "top_k_global-seed2").rename(tmp_path / "aside")
    (other / "top_k_global-seed2").rename(suite / "top_k_global-seed2")
    assert failures(report(suite)["runs"]) == [
        "top_k_global, seed 2: failed at step 400 of 400: its counts are for 1 MoE layers x 8 domains x 32 experts, "
        "those of seed 1 for 2 MoE layers x 8 domains x 32 experts"
    ]


def test_layers_without_counts_are_left_out_of_the_means(suite: Path) -> None:
    with np.load(evaluation(suite)) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    for name in ("counts_top_1_YDE", "counts_top_k_YDE", "weight_YDE", "coactivation_YEE", "vocabulary_counts_YVE"):
        content[name][1] = 0
    np.savez(evaluation(suite), **content)
    results = report(suite)
    assert results["notes"] == [
        "top_k_global, seed 1: no assignments in MoE layer 1, left out of the means over layers"
    ]
    (run,) = [run for run in results["runs"] if run["label"] == "top_k_global"]
    information = run["routing"]["top_k"]["domain_information"]
    assert information["layers"][1]["mean"] is None
    assert information["mean"] == information["layers"][0]["mean"] > 0


def test_counts_of_zero_everywhere(suite: Path) -> None:
    with np.load(evaluation(suite)) as arrays:
        zero = {name: 0 * arrays[name] for name in arrays.files if "counts" in name or name == "coactivation_YEE"}
    edit(evaluation(suite), **zero)
    results = report(suite)
    assert "no assignments in MoE layers 0, 1" in results["notes"][0]
    (run,) = [run for run in results["runs"] if run["label"] == "top_k_global"]
    assert run["routing"]["top_k"]["domain_information"]["mean"] is None and run["loss"]["mean"] is not None


def test_a_single_domain(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=LABELS, domains=("only",))
    results = report(suite)
    assert results["notes"] == ["only is the only domain: specialization by domain has no meaning here"]
    run = results["runs"][0]
    assert run["routing"]["top_k"]["domain_information"]["mean"] is None
    assert run["routing"]["top_k"]["normalised_effective_experts"]["mean"] > 0
    assert run["causes"]["forced_elsewhere"] is None and run["causes"]["keep_only_group"] is not None


def test_dense_runs_alone(make_suite: MakeSuite) -> None:
    results = report(make_suite(labels=("dense",), reference=(), control=None))
    assert results["notes"] == []
    assert results["runs"][0]["loss"]["mean"] is not None


def test_an_analysis_of_other_domains_is_left_out(suite: Path) -> None:
    edit(suite / "top_k_global-seed1" / "analysis.npz", domains=np.array(list("abcdefgh")))
    assert report(suite)["notes"] == [
        "top_k_global, seed 1: analysis.npz cannot be used: it is of other domains than the evaluation"
    ]


def test_arrays_that_fit_and_make_no_sense_cost_their_part(suite: Path) -> None:
    edit(evaluation(suite), coactivation_YEE=np.full((2, 32, 32), -1))
    results = report(suite)
    (note,) = results["notes"]
    assert note.startswith("top_k_global: no numbers of co-activation: coactivation_EE must be counts")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("dropped_YDE", 10**9, "dropped_YDE exceeds counts_top_k_YDE, of which it is a part"),
        ("dropped_YDE", -1, "dropped_YDE has counts that are negative or not finite"),
        ("counts_top_1_YDE", -1, "counts_top_1_YDE has counts that are negative or not finite"),
        ("counts_top_k_YDE", np.nan, "counts_top_k_YDE has counts that are negative or not finite"),
        ("shuffled_counts_top_k_YDE", np.inf, "shuffled_counts_top_k_YDE has counts that are negative or not finite"),
        ("sequence_domain_N", 8, "sequence_domain_N has values from 8 to 8 instead of -1 to 7"),
        ("sequence_domain_N", -1, "none of its sequences has a domain"),
        ("sequence_loss_N", "?", "sequence_loss_N has values of type <U1 instead of numbers"),
    ],
)
def test_an_evaluation_that_contradicts_itself_fails_its_training_alone(
    suite: Path, name: str, value: float | str, reason: str
) -> None:
    with np.load(evaluation(suite)) as arrays:
        shape = arrays[name].shape
    edit(evaluation(suite), **{name: np.full(shape, value)})
    results = summarise(read_suite(suite))
    assert failures(results["runs"]) == [
        f"top_k_global, seed 1: failed at step 400 of 400: its evaluation cannot be used: {reason}"
    ]
    assert all(run["loss"]["mean"] is not None for run in results["runs"] if run["label"] != "top_k_global")


def test_optional_arrays_out_of_range_are_left_out_and_told(suite: Path) -> None:
    edit(
        evaluation(suite),
        cluster_domain_C=np.full(64, -1),
        vocabulary_counts_YVE=np.full((2, 40, 32), -1),
    )
    owner_YE = np.full((2, 32), 3)
    owner_YE[1, 5] = 8
    edit(suite / "top_k_global-seed1" / "analysis.npz", owner_YE=owner_YE, group_YE=owner_YE - 5)
    results = summarise(read_suite(suite))
    start = "top_k_global, seed 1: left out of"
    assert results["notes"] == [
        f"{start} its evaluation: vocabulary_counts_YVE has counts that are negative or not finite",
        f"{start} its evaluation: cluster_domain_C has no domain in it",
        f"{start} analysis.npz: owner_YE has values from 3 to 8 instead of -1 to 7",
        f"{start} analysis.npz: group_YE has values from -2 to 3 instead of -1 to 7",
    ]
    (run,) = [run for run in results["runs"] if run["label"] == "top_k_global"]
    assert run["vocabulary"] is None and run["loss"]["over"] == "documents"
    assert run["causes"]["specificity"] is None and run["causes"]["forced_elsewhere"] is not None


def test_statistics_with_impossible_counts_are_left_out_and_told(suite: Path) -> None:
    path = suite / "top_k_global-seed1" / "statistics" / "step_00000100.npz"
    edit(path, counts_top_k_YDE=np.full((2, 8, 32), -1))
    assert summarise(read_suite(suite))["notes"] == [
        "top_k_global, seed 1: 1 of 8 statistics files left out: step_00000100.npz cannot be read (counts_top_k_YDE "
        "has counts that are negative or not finite)"
    ]


@pytest.mark.parametrize("error", [ValueError("two\nlines"), IndexError("two\nlines")])
def test_a_part_that_fails_is_one_line(suite: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(evaluations: object) -> None:
        raise error

    monkeypatch.setattr("moe_testbed.launcher.report.numbers.routing.agreement", fail)
    results = summarise(read_suite(suite))
    assert results["notes"] == [f"{label}: no numbers of agreement: two lines" for label in LABELS]


def test_a_run_cut_off_half_way(suite: Path) -> None:
    folder = suite / "top_k_global-seed1"
    (folder / "status.json").write_text('{"state": "running", "step": 220, "steps": 400}')
    evaluation(suite).write_bytes(evaluation(suite).read_bytes()[:1000])
    for name in ("metrics.jsonl", "summary.json", "manifest.json"):
        text = (folder / name).read_text()
        (folder / name).write_text(text[: len(text) // 2])
    (folder / "config.yaml").write_bytes(b"name: \xff")
    results = report(suite)
    assert failures(results["runs"]) == ["top_k_global, seed 1: running at step 220 of 400: cut off at step 220 of 400"]
    assert read_suite(suite).of("top_k_global")[0].config == {}
    assert results["runs"][0]["recovered"]["value"] == 1.0


def test_settings_and_figures_of_another_kind_are_not_there(suite: Path) -> None:
    folder = suite / "top_k_global-seed1"
    (folder / "config.yaml").write_text("model: 3\nrouting: {router: top_k}\nevaluation: [validation]\n")
    (folder / "summary.json").write_text('{"tokens_per_second": null, "parameters": "many", "tokens": 7}')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evaluation", "step": 401, "cross_entropy": null}\n')
    (run,) = [run for run in report(suite)["runs"] if run["label"] == "top_k_global"]
    assert run["router"] == "unknown" and run["loss"]["mean"] is not None
    assert [run[name]["mean"] for name in ("tokens_per_second", "parameters", "tokens")] == [None, None, 7]


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("runs", ["a", "b"], "runs is ['a', 'b'], but must be a mapping from labels to descriptions"),
        ("seeds", 3, "seeds is 3, but must be a list of different whole numbers of at least 0, such as [1, 2]"),
        ("seeds", ["one"], "seeds is ['one'], but must be a list of different whole numbers"),
        ("seeds", [1, 1], "seeds is [1, 1], but must be a list of different whole numbers"),
        ("reference", 3, "reference is 3, but must be a label in runs, or a list of them"),
        ("reference", [["a"]], "reference is [['a']], but must be a label in runs, or a list of them"),
        ("control", ["a"], "control is ['a'], but must be a label in runs"),
    ],
)
def test_a_suite_of_other_kinds_is_one_line(tmp_path: Path, key: str, value: object, complaint: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"runs": {"a": "the only"}, key: value}))
    with pytest.raises(ValueError) as raised:
        read_suite(tmp_path)
    assert str(raised.value).startswith(f"{path}: {complaint}")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"runs: [a,\nb"])
def test_a_suite_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "suite.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a suite's folder: suite\.yaml cannot be read") as raised:
        read_suite(tmp_path)
    assert "\n" not in str(raised.value)


def test_runs_of_old_have_a_report(make_suite: MakeSuite) -> None:
    results = report(make_suite(labels=LABELS, recorded=False))
    assert results["notes"] == []
    run = results["runs"][2]
    assert run["causes"] is run["over_training"] is run["vocabulary"] is run["router_measures"] is None
    assert run["agreement"]["precision"]["mean"] is not None
    assert [table.section for table in extra_tables(results)] == ["agreement"]


def test_a_suite_without_reference_says_what_is_there_instead(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("top_k_global", "top_k_sequence"), reference=(), control=None)
    results = report(suite)
    (line,) = headlines(results)
    assert line.tone == "plain"
    assert line.text.startswith("This suite names no reference: it shows how experts are used, not how far")
    assert "Those of top_k_global specialise most by domain: domain information 0." in line.text
    assert results["runs"][0]["recovered"]["undefined"] == "the suite names no reference"


def test_a_suite_without_control_says_so_plainly(make_suite: MakeSuite) -> None:
    results = report(make_suite(labels=("reference", "top_k_global"), control=None))
    lines = headlines(results)
    assert [line.tone for line in lines] == ["caution", "plain"]
    assert lines[1].text.startswith("The suite names no control")
