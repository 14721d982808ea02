"""What is told of runs and suites, from folders made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_testbed.launcher.report import words
from moe_testbed.launcher.tracking.content import run_content, suite_content
from tests.tracking.folders import MANIFEST, make_run, make_suite


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A suite with sentences of the test's own."""
    monkeypatch.setattr(words, "verdict", lambda run, _: words.Verdict(f"is {run['role']}.", "plain", run["label"]))
    monkeypatch.setattr(words, "headlines", lambda _: [words.Verdict("It wins.", "good"), words.Verdict("So.", "good")])
    return make_suite(tmp_path / "demo")


def test_tags_of_a_run(suite: Path) -> None:
    tags = run_content(suite / "top_k-seed2", suite, {"more": "x", "empty": ""}).tags
    assert tags.pop("mlflow.note.content").startswith("**top_k** is learned.\n")
    assert tags == {
        "label": "top_k",
        "seed": "2",
        "router": "top_k",
        "balance": "load_balancing_loss, z_loss",
        "balance_scope": "sequence",
        "commit": "c0ffee",
        "suite": "demo",
        "role": "learned",
        "more": "x",
    }
    alone = run_content(suite / "top_k_hash-seed1").tags
    assert alone == {"label": "top_k_hash", "seed": "1", "router": "hash", "commit": "c0ffee"}


def test_parameters_of_old_runs_have_the_names_of_today(tmp_path: Path) -> None:
    old = make_run(tmp_path / "old", statistics={"points": 4}, routing={"pool": "first_m", "router": {"pool": "token"}})
    parameters = run_content(old).parameters
    assert {key: parameters[key] for key in parameters if "po" in key} == {
        "probe.points": "4",
        "routing.pooling": "first_m",
        "routing.router.pool": "token",
    }


def test_a_dense_model_has_no_router(tmp_path: Path) -> None:
    model, routing = {"dense_baseline": True}, {"router": {"name": "top_k"}}
    assert run_content(make_run(tmp_path / "dense", model=model, routing=routing)).tags["router"] == "dense"


def test_results_are_the_numbers_of_the_report_that_are_there(suite: Path) -> None:
    assert run_content(suite / "top_k-seed1", suite).results == {
        "result/loss": 3.0,
        "result/recovered": 0.75,
        "result/domain_information": 0.25,
    }
    assert run_content(suite / "top_k-seed1").results == {}
    assert suite_content(suite).results == {"result/lead_over_control": 0.5}


def test_what_a_training_has_taken_is_told_with_and_without_what_it_inherits(suite: Path) -> None:
    ledger = {
        "flops": 700, "flops_by_part": {"encoder": 200, "decoder": 400, "output": 100, "other": 9},
        "layer_units": 6.5, "layer_units_by_part": {"encoder": 2.5, "decoder": 4},
        "inherited_flops": 300, "inherited_layer_units": 2.0,
    }  # fmt: skip
    run = suite / "top_k-seed1"
    (run / "summary.json").write_text(json.dumps({"ledger": ledger}))
    expected = {
        "ledger/flops": 700, "ledger/flops_of_encoder": 200, "ledger/flops_of_decoder": 400,
        "ledger/flops_of_output": 100, "ledger/inherited_flops": 300, "ledger/flops_with_inherited": 1000,
        "ledger/layer_units": 6.5, "ledger/inherited_layer_units": 2.0, "ledger/layer_units_with_inherited": 8.5,
        "ledger/layer_units_of_encoder": 2.5, "ledger/layer_units_of_decoder": 4,
    }  # fmt: skip
    assert run_content(run).results == expected
    assert run_content(run, suite).results.items() > expected.items()
    unknown = {"inherited_flops": None, "inherited_layer_units": None}
    (run / "summary.json").write_text(json.dumps({"ledger": ledger | unknown}))
    assert run_content(run).results == {key: value for key, value in expected.items() if "inherited" not in key}
    for damage in ({"flops": "many"}, {"layer_units_by_part": 3}, {"flops_by_part": {"encoder": None}}):
        (run / "summary.json").write_text(json.dumps({"ledger": ledger | damage}))
        assert run_content(run).results == {}


def test_results_of_a_stack_have_its_name(suite: Path) -> None:
    report = json.loads((suite / "results.json").read_text())
    numbers = {"routing": {"top_k": {"domain_information": {"mean": 0.5}, "max_violation": {"mean": None}}}}
    report["runs"][0]["stacks"] = {"encoder": numbers, "decoder": 3, "another": numbers}
    (suite / "results.json").write_text(json.dumps(report))
    results = run_content(suite / "top_k-seed1", suite).results
    assert {key: value for key, value in results.items() if key.count("/") > 1} == {
        "result/encoder/domain_information": 0.5
    }


def test_files_of_a_run_are_its_own_and_its_pictures(suite: Path) -> None:
    short, long = (set(run_content(suite / f"{label}-seed1", suite).files) for label in ("top_k", "top_k_hash"))
    figures = {path for path in short | long if path.startswith("figures/")}
    assert figures & short == {
        "figures/routing_top_k.svg",
        "figures/routing_top_k_all_layers.png",
        "figures/causal_top_k.svg",
    }
    assert figures & long == {"figures/routing_top_k_hash.svg"}
    assert short - figures == {
        "config.yaml", "summary.json", "status.json", "manifest.json", "analysis.npz", "matrices/counts_top_k.csv",
        "evaluations/step_00000030.npz", "statistics/step_00000030.npz",
    }  # fmt: skip


def test_matrices_have_every_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    counts_YDE = np.random.default_rng(1).integers(0, 99, (3, 2, 5))
    np.savez(run / "evaluations" / "step_00000040.npz", domains=np.array(["a,b", "c"]), dropped_YDE=counts_YDE)
    files = run_content(run).files
    assert {name for name in files if name.startswith("matrices/")} == {"matrices/dropped.csv"}
    lines = str(files["matrices/dropped.csv"]).splitlines()
    assert lines[0] == "moe_layer,domain," + ",".join(f"expert_{expert}" for expert in range(5))
    expected = [
        f"{layer},{name}," + ",".join(str(int(count)) for count in counts_YDE[layer, domain])
        for layer in range(3)
        for domain, name in enumerate(('"a,b"', "c"))
    ]
    assert lines[1:] == expected


def test_matrices_of_several_stacks_name_them(tmp_path: Path) -> None:
    moe = {"num_experts": 5, "top_k": 2, "expert_hidden_size": 8}
    model = {"architecture": "encoder_decoder", "num_layers": 1, "hidden_size": 8, "num_heads": 1, "moe": moe}
    run = make_run(tmp_path / "run", model=model)
    for num_layers, names in ((2, ["encoder 0", "decoder 0"]), (3, ["0", "1", "2"])):
        counts_YDE = np.ones((num_layers, 1, 5), dtype=np.int64)
        np.savez(run / "evaluations" / "step_00000040.npz", domains=np.array(["a"]), counts_top_k_YDE=counts_YDE)
        lines = str(run_content(run).files["matrices/counts_top_k.csv"]).splitlines()
        assert [line.split(",")[0] for line in lines[1:]] == names


def test_the_dataset_is_known_by_its_manifest(suite: Path) -> None:
    one, other = (run_content(suite / f"top_k-seed{seed}").dataset for seed in (1, 2))
    assert one is not None and one == other
    assert (one.name, one.tokens) == ("two", {"law": 700, "music": 300})
    (suite / "top_k-seed2" / "manifest.json").write_text(json.dumps(MANIFEST | {"format": 9}))
    changed = run_content(suite / "top_k-seed2").dataset
    assert changed is not None and changed.digest != one.digest


def test_a_suite(suite: Path) -> None:
    content = suite_content(suite)
    note = content.tags.pop("mlflow.note.content")
    assert note.startswith("- It wins.\n- So.\n")
    assert content.tags == {"suite": "demo", "control": "top_k_hash", "seeds": "1, 2"}
    assert set(content.files) == {
        "suite.yaml", "report.html", "results.json", "results.csv", "tables/runs.tex", "figures/scatter.svg",
        "figures/routing_top_k.svg", "figures/routing_top_k_all_layers.png", "figures/routing_top_k_hash.svg",
        "figures/causal_top_k.svg",
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"runs": [1]}',
        '{"runs": [{"label": "top_k"}], "reference": 3}',
        '{"runs": [{"label": "top_k", "loss": 3.5}], "reference": {"lead_over_control": 0.5}}',
    ],
)
def test_a_report_that_cannot_be_read_is_done_without(content: str, tmp_path: Path) -> None:
    suite = make_suite(tmp_path / "demo")
    (suite / "results.json").write_text(content)
    run = suite / "top_k-seed1"
    (run / "evaluations" / "step_00000099.npz").write_bytes(b"PK cut off")
    (run / "manifest.json").write_text("{")
    told = run_content(run, suite)
    assert told.results == {} and told.dataset is None
    assert "evaluations/step_00000099.npz" in told.files
    assert suite_content(suite).results == {}
