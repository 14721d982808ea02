"""Models of several stacks: layers have the name of their stack, and each stack has means of its own.

Shape legend: Y MoE layers, T tokens of the probe, D domains, E experts.
"""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.figures import figures, heatmaps
from moe_testbed.launcher.report.numbers.results import read_results, summarise
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.extra_tables import ExtraTable, extra_tables
from moe_testbed.launcher.report.write import write_report
from moe_testbed.launcher.tracking.content import run_content
from moe_testbed.routing import metrics
from tests.report.conftest import DOMAINS, FakeRun, edit, write_suite

NAMES = ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
OF_STACK = {"encoder": [0, 1], "decoder": [2, 3]}
MODEL = {
    "num_layers": 2, "hidden_size": 128, "num_heads": 4,
    "moe": {"num_experts": 16, "top_k": 2, "expert_hidden_size": 64},
}  # fmt: skip


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal run, an encoder, and a model that starts from it, whose probe keeps the first choices of half of the
    tokens in the encoder."""
    runs = {
        "causal": FakeRun("top_k", 0.1, 0.3),
        "mlm": FakeRun("top_k", 0.5, 0.6),
        "child": FakeRun("top_k", 0.2, 0.5, 0.3, drops=0.02),
    }
    seeds = (1, 2)
    sizes = {"num_layers": 4, "num_experts": 16}
    folder = write_suite(tmp_path_factory.mktemp("stacks") / "suite", runs, seeds, (), None, **sizes)
    for seed in seeds:
        change(folder / f"mlm-seed{seed}", {"architecture": "encoder", "encoder": {"num_layers": 4}}, {})
        child = folder / f"child-seed{seed}"
        start = {"encoder": {"run": "mlm", "take": "all"}, "decoder": "random"}
        change(child, {"architecture": "encoder_decoder"}, {"start": start, "freeze": {"encoder": {"until": 0.5}}})
        routed_YD = np.repeat([[8192], [8192], [4096], [4096]], len(DOMAINS), axis=1)
        edit(evaluation_of(child), routed_tokens_YD=routed_YD)
        with np.load(max((child / "statistics").iterdir())) as last:
            arrays = dict(last)
        ids_YTW = arrays["expert_ids_YTW"].copy()
        ids_YTW[:, ::2] = (ids_YTW[:, ::2] + 1) % 16
        arrays |= {"step": 0, "expert_ids_YTW": ids_YTW, "counts_top_k_YDE": 0 * arrays["counts_top_k_YDE"]}
        np.savez(child / "statistics" / "step_00000000.npz", **arrays)
    write_report(folder)
    return folder


def change(run: Path, model: dict[str, Any], config: dict[str, Any]) -> None:
    """Gives a constructed run a whole config of the model."""
    tree = yaml.safe_load((run / "config.yaml").read_text())
    name = run.name.rpartition("-")[0]
    (run / "config.yaml").write_text(yaml.safe_dump({**tree, "name": name, "model": MODEL | model, **config}))


def evaluation_of(run: Path) -> Path:
    return next((run / "evaluations").iterdir())


@pytest.fixture(scope="module")
def results(suite: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((suite / "results.json").read_text())
    return content


def run_of(results: dict[str, Any], label: str) -> dict[str, Any]:
    found: dict[str, Any] = next(run for run in results["runs"] if run["label"] == label)
    return found


def test_layers_have_the_names_of_their_stacks(results: dict[str, Any]) -> None:
    assert run_of(results, "child")["moe_layers"] == NAMES
    assert run_of(results, "mlm")["moe_layers"] == ["encoder 0", "encoder 1", "encoder 2", "encoder 3"]


def test_each_stack_has_its_means_beside_those_of_all_layers(suite: Path, results: dict[str, Any]) -> None:
    """From the files, by the metrics' own functions: means over seeds of the means over a stack's layers."""
    child = run_of(results, "child")
    arrays = [dict(np.load(evaluation_of(suite / f"child-seed{seed}"))) for seed in (1, 2)]
    for stack, layers in OF_STACK.items():
        for name in ("domain_information", "max_violation", "dead_experts", "purity"):
            by_seed = [[getattr(metrics, name)(one["counts_top_k_YDE"][y]) for y in layers] for one in arrays]
            found = child["stacks"][stack]["routing"]["top_k"][name]
            assert found["mean"] == pytest.approx(np.mean(by_seed)), name
            assert found["spread"] == pytest.approx(np.std(np.mean(by_seed, axis=1), ddof=1)), name
            layer_means = [layer["mean"] for layer in found["layers"]]
            assert layer_means == pytest.approx(np.mean(by_seed, axis=0).tolist())
            whole = child["routing"]["top_k"][name]
            assert [layer["mean"] for layer in whole["layers"]][layers[0] : layers[-1] + 1] == layer_means
        entropies = [
            np.mean([(one["entropy_sum_YD"][y] / one["routed_tokens_YD"][y]).mean() for y in layers]) for one in arrays
        ]
        entropy = child["stacks"][stack]["router_measures"]["mean_token_entropy"]
        assert entropy["mean"] == pytest.approx(np.mean(entropies))
    # Two choices of 4,096 tokens are one of 8,192: each layer counts by the tokens that it has routed.
    assert child["stacks"]["encoder"]["experts_per_token"]["mean"] == 1
    assert child["stacks"]["decoder"]["experts_per_token"]["mean"] == 2
    assert child["experts_per_token"]["mean"] == 1.5
    assert child["stacks"]["encoder"]["over_training"]["steps"] == child["over_training"]["steps"]
    # What is done to all layers at once is of no stack.
    assert child["causes"]["keep_only_group"] is not None
    assert child["stacks"]["decoder"]["causes"]["keep_only_group"] is None
    assert run_of(results, "mlm")["stacks"]["encoder"]["routing"] == run_of(results, "mlm")["routing"]


def test_a_causal_run_says_nothing_of_stacks(suite: Path, results: dict[str, Any]) -> None:
    causal = run_of(results, "causal")
    assert not {"stacks", "moe_layers", "routing_kept"} & causal.keys()
    layers = {row["moe_layer"] for row in rows_of(suite) if row["run"] == "causal"}
    assert layers == {"", "mean", "0", "1", "2", "3"}


def rows_of(suite: Path) -> list[dict[str, str]]:
    with (suite / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_table_of_all_numbers_names_layers_and_stacks(suite: Path, results: dict[str, Any]) -> None:
    rows = [row for row in rows_of(suite) if row["run"] == "child"]
    found = {row["moe_layer"]: row for row in rows if row["quantity"] == "purity" and row["form"] == "top_k"}
    assert list(found) == ["mean", *NAMES, "mean of encoder", "mean of decoder"]
    for stack in OF_STACK:
        expected = run_of(results, "child")["stacks"][stack]["routing"]["top_k"]["purity"]["mean"]
        assert float(found[f"mean of {stack}"]["mean"]) == pytest.approx(expected)
    assert not any(row["quantity"] == "keep_only_group" and "of" in row["moe_layer"] for row in rows)


def test_what_remains_of_the_encoders_routing_against_loops(suite: Path, results: dict[str, Any]) -> None:
    """Token by token, in the layers of the encoder alone."""
    kept = run_of(results, "child")["routing_kept"]
    by_domain: dict[str, list[float]] = {domain: [] for domain in DOMAINS}
    shares, sets, pairs = [], [], []
    for seed in (1, 2):
        files = sorted((suite / f"child-seed{seed}" / "statistics").iterdir())
        first, last = dict(np.load(files[0])), dict(np.load(files[-1]))
        before_YTW, now_YTW = (one["expert_ids_YTW"][:2].tolist() for one in (first, last))
        for before_TW, now_TW in zip(before_YTW, now_YTW, strict=True):
            for before, now, domain in zip(before_TW, now_TW, last["domain_T"], strict=True):
                shares.append(before[0] == now[0])
                sets.append(len({*before} & {*now}) / len({*now}))
                by_domain[DOMAINS[domain]].append(before[0] == now[0])
            pairs.append(np.mean([a[0] == b[0] for a in before_TW for b in now_TW]))
    assert kept["first_choice_kept"]["mean"] == pytest.approx(np.mean(shares)) == 0.5
    assert kept["choices_kept"]["mean"] == pytest.approx(np.mean(sets)) == 0.75
    assert kept["first_choice_kept_chance"]["mean"] == pytest.approx(np.mean(pairs))
    assert kept["first_choice_kept_by_domain"].keys() == by_domain.keys()
    for domain, values in by_domain.items():
        assert kept["first_choice_kept_by_domain"][domain]["mean"] == pytest.approx(np.mean(values))
    assert len(kept["first_choice_kept"]["layers"]) == 2
    course = kept["over_training"]
    assert course["steps"][0] == 0 and course["curves"]["first_choice_kept"]["mean"][0] == 1
    assert course["curves"]["first_choice_kept"]["mean"][-1] == pytest.approx(kept["first_choice_kept"]["mean"])
    assert "routing_kept" not in run_of(results, "mlm")
    rows = [row for row in rows_of(suite) if row["quantity"] == "first_choice_kept"]
    assert {row["moe_layer"] for row in rows} == {"mean", "encoder 0", "encoder 1"}
    assert {row["domain"] for row in rows} == {"", *DOMAINS}


@pytest.mark.parametrize("missing", ["step 0", "the encoder's layers", "all files"])
def test_without_the_routing_before_nothing_is_said_of_what_remains(
    missing: str, suite: Path, tmp_path: Path, copy_suite: Callable[[Path], Path]
) -> None:
    folder = copy_suite(suite)
    for seed in (1, 2):
        run = folder / f"child-seed{seed}"
        if missing == "the encoder's layers":
            change(run, {"architecture": "encoder_decoder"}, {"start": {"encoder": {"run": "mlm", "take": "tables"}}})
        for file in sorted((run / "statistics").iterdir())[: {"step 0": 1, "all files": None}.get(missing, 0)]:
            file.unlink()
    assert "routing_kept" not in run_of(read_results(folder), "child")


def test_a_config_that_does_not_fit_the_counts_names_no_stacks(suite: Path, copy_suite: Callable[[Path], Path]) -> None:
    folder = copy_suite(suite)
    for seed, model in ((1, {"num_layers": 3}), (2, {"num_layers": "many"})):
        change(folder / f"child-seed{seed}", {"architecture": "encoder_decoder", **model}, {})
    assert "stacks" not in run_of(read_results(folder), "child")


@pytest.fixture
def copy_suite(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a suite into a fresh folder."""
    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy"))


def test_tables_and_figures_name_layers_and_stacks(suite: Path, results: dict[str, Any]) -> None:
    tables: dict[str, ExtraTable] = {table.title: table for table in extra_tables(results)}
    settled = tables["When each layer settles"]
    causal = [f"MoE layer {layer}" for layer in range(4)]
    assert sorted(settled.columns) == sorted(["Run", *causal, *NAMES, "encoder 2", "encoder 3"])
    cells = {row[0].text: dict(zip(settled.columns, row, strict=True)) for row in settled.rows}
    assert cells["child"]["encoder 2"].text == "–" and cells["child"]["decoder 1"].text != "–"
    by_stack = tables["Use and specialization by stack"]
    assert [(row[0].text, row[1].text) for row in by_stack.rows] == [("child", "encoder"), ("child", "decoder")]
    of_agreement = tables["Experts matched to domains, by stack"]
    precision = run_of(results, "child")["stacks"]["decoder"]["agreement"]["precision"]["mean"]
    assert of_agreement.rows[1][of_agreement.columns.index("Precision")].value == precision
    kept = tables["What remains of the encoder's routing"]
    assert [cell.text for cell in kept.rows[0]][:2] == ["child", "0.50"]
    of_domains = tables["What remains of the encoder's routing, by domain"]
    assert of_domains.columns == ("Run", "Share", *DOMAINS) and len(of_domains.rows) == 4
    assert {
        "layers", "layers_encoder", "layers_decoder", "training", "training_encoder", "training_decoder",
        "routing_kept", "router_layers_encoder", "causal_layers_decoder", "routing_child",
    } <= {path.stem for path in (suite / "figures").iterdir()}  # fmt: skip


def test_heat_maps_have_the_names_of_the_layers(suite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for three layers, those at the ends of each stack are on the page, and all of them in the file."""
    monkeypatch.setattr(figures, "SHOWN_LAYERS", 3)
    monkeypatch.setattr(figures, "draw", list)
    monkeypatch.setattr(heatmaps, "_draw", lambda maps, columns: [one.title for one in maps])
    read = read_suite(suite)
    jobs = {job.name: job for job in figures.draw_all(read, summarise(read))}
    child, mlm, causal = (jobs[f"routing_{label}"] for label in ("child", "mlm", "causal"))
    assert child.draw(*child.arguments) == child.draw(*child.whole) == NAMES
    assert "First and last layer of each stack of 4 MoE layers" in child.caption
    assert mlm.draw(*mlm.arguments) == ["encoder 0", "encoder 2", "encoder 3"]
    assert causal.draw(*causal.arguments) == ["MoE layer 0", "MoE layer 2", "MoE layer 3"]
    assert causal.draw(*causal.whole) == [f"MoE layer {layer}" for layer in range(4)]


def test_mlflow_gets_each_stacks_numbers_and_matrices_with_names(suite: Path, results: dict[str, Any]) -> None:
    content = run_content(suite / "child-seed1", suite)
    for stack in OF_STACK:
        expected = run_of(results, "child")["stacks"][stack]["routing"]["top_k"]["domain_information"]["mean"]
        assert content.results[f"result/{stack}/domain_information"] == expected
    whole, encoder = (content.results[f"result/{of}domain_information"] for of in ("", "encoder/"))
    assert whole != encoder
    lines = str(content.files["matrices/counts_top_k.csv"]).splitlines()
    assert [line.split(",")[0] for line in lines[1 :: len(DOMAINS)]] == NAMES
    causal = run_content(suite / "causal-seed1", suite)
    assert not any("encoder" in name for name in causal.results)
    assert [str(causal.files["matrices/counts_top_k.csv"]).splitlines()[1 + 8 * y][0] for y in range(4)] == list("0123")
