"""What second stages save, by closed forms; and a report on a constructed suite of stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.numbers.pairwise import pairs
from moe_testbed.launcher.report.numbers.results import ranked, summarise
from moe_testbed.launcher.report.numbers.stages import CostAtLoss, cost_at_loss, saved, students_interval
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.tables.stage_tables import stage_tables
from moe_testbed.launcher.report.write import write_report
from tests.report.conftest import FakeRun, edit, write_suite

DENOISING = {"name": "denoising", "rate": 0.15}


def test_the_cost_at_a_loss_is_linear_in_the_logarithm_between_two_points() -> None:
    costs, losses = np.array([100.0, 400.0, 1600.0]), np.array([3.0, 2.0, 1.0])
    assert cost_at_loss(costs, losses, 1.5) == CostAtLoss(pytest.approx(800.0))
    assert cost_at_loss(costs, losses, 2.0) == CostAtLoss(pytest.approx(400.0))
    assert cost_at_loss(costs, losses, 3.5) == CostAtLoss(100.0, is_bound=True)
    assert cost_at_loss(costs, losses, 0.9) == CostAtLoss(None)
    # The first crossing counts, also where the loss rises again.
    assert cost_at_loss(costs, np.array([3.0, 1.0, 2.0]), 2.0) == CostAtLoss(pytest.approx(200.0))
    assert cost_at_loss(np.zeros(0), np.zeros(0), 1.0) == CostAtLoss(None)


def test_what_the_paper_saves_in_its_own_units() -> None:
    """12 layers cost 5 units, 24 cost 10, the second stage 6: both together 27 % less."""
    found = saved(5.0, 10.0, CostAtLoss(6.0))
    assert found.share == pytest.approx(0.2667, abs=1e-4)
    assert saved(5.0, 10.0, CostAtLoss(None)).share is None
    assert saved(5.0, 10.0, CostAtLoss(12.0)).share == pytest.approx(-2 / 15)


def test_students_interval_by_hand() -> None:
    """Mean 2, standard deviation 1, three values: 4.303 / sqrt(3) to both sides."""
    low, high = students_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)
    assert students_interval([1.0]) == (None, None)


def stage(
    folder: Path, label: str, seed: int, flops: float, inherited: float = 0.0, steps: int = 400, **config: Any
) -> None:
    """Makes a constructed run one of a stage."""
    run = folder / f"{label}-seed{seed}"
    tree = yaml.safe_load((run / "config.yaml").read_text())
    model = {"architecture": "encoder_decoder", "embeddings": "shared"} | config.pop("model", {})
    (run / "config.yaml").write_text(yaml.safe_dump({**tree, "model": tree["model"] | model, **config}))
    summary = json.loads((run / "summary.json").read_text())
    part = {"encoder": flops / 4, "decoder": flops / 2, "output": flops / 4}
    ledger = {"flops": flops, "flops_by_part": part, "layer_units": flops / 10}
    ledger |= {"inherited_flops": inherited, "inherited_layer_units": inherited / 10}
    (run / "summary.json").write_text(json.dumps({**summary, "ledger": ledger}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "train":
            line["flops"] = flops * line["step"] / 400
        else:
            line["copied/cross_entropy"] = 2.0 - line["step"] / 200
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def make_stages(tmp_path: Path) -> Callable[..., Path]:
    """An encoder, a model from scratch, and two second stages whose losses lie above and below that."""

    def make(seeds: tuple[int, ...] = (1, 2)) -> Path:
        gaps = {"mlm": 2.0, "scratch": 0.5, "short": 0.7, "long": 0.3, "other_tables": 0.1}
        runs = {label: FakeRun("top_k", gap, dense=True) for label, gap in gaps.items()}
        folder = write_suite(tmp_path / "recipes", runs, seeds, reference=(), control=None, noise=0.0)
        start = {"encoder": {"run": "mlm", "take": "all"}, "decoder": "random"}
        freeze = {"encoder": {"until": 0.25}}
        for seed in seeds:
            stage(folder, "mlm", seed, 100.0, model={"architecture": "encoder"}, objective={"name": "masked"})
            stage(folder, "scratch", seed, 200.0, objective=DENOISING)
            stage(folder, "short", seed, 100.0, 100.0, objective=DENOISING, start=start, freeze=freeze)
            stage(folder, "long", seed, 400.0, 100.0, objective=DENOISING, start=start, freeze=freeze)
            equal = {"embeddings": "equal_start"}
            stage(folder, "other_tables", seed, 50.0, 100.0, model=equal, objective=DENOISING, start=start)
            for label in ("scratch", "long"):
                file = next((folder / f"{label}-seed{seed}" / "evaluations").iterdir())
                losses, kinds = np.array([30.0, 140.0, 60.0]), np.array(["copied", "first_of_gap", "rest_of_gap"])
                edit(file, kinds=kinds, kind_tokens_X=np.array([60, 20, 20]), kind_loss_sum_X=losses,
                     kind_correct_X=np.array([30, 1, 4]), correct_D=np.full(8, 1024))  # fmt: skip
        return folder

    return make


def test_a_suite_of_stages_tells_what_was_taken_and_saved(make_stages: Callable[..., Path]) -> None:
    results = summarise(read_suite(make_stages()))
    staged = results["stages"]
    assert staged["tasks"]["mlm"] == "encoder, masked" and staged["tasks"]["long"] == staged["tasks"]["scratch"]
    assert (
        staged["ledger"]["long"]["flops"]["mean"] == 400 and staged["ledger"]["long"]["inherited_flops"]["mean"] == 100
    )
    assert staged["ledger"]["scratch"]["flops_by_part"]["decoder"]["mean"] == 100
    assert staged["kinds"]["scratch"]["copied"]["loss"]["mean"] == pytest.approx(0.5)
    assert staged["kinds"]["scratch"]["first_of_gap"]["accuracy"]["mean"] == pytest.approx(0.05)
    assert staged["accuracy"]["scratch"]["mean"] == pytest.approx(0.25)
    # 2 - step / 200 is first below 1 at step 250 of those that are evaluated.
    assert staged["copying_step"]["scratch"]["steps"] == [250, 250]
    # The run with other tables has no run from scratch beside it, and is not compared.
    found = [one for one in staged["saved"] if one["currency"] == "flops"]
    assert [(one["recipe"], one["second_stages"], one["scratch"]) for one in found] == [
        ("frozen for 25 %", ["short", "long"], "scratch")
    ]
    # Losses .7, .3 above at costs 100, 400: .5 lies at 200, as much as from scratch.
    assert found[0]["ends"]["mean"] == pytest.approx(0.0, abs=1e-6) and found[0]["ends"]["reached"] == 2


def test_losses_of_different_tasks_are_not_compared(make_stages: Callable[..., Path]) -> None:
    suite = read_suite(make_stages())
    results = summarise(suite)
    assert [run["label"] for run in ranked(results)] == ["mlm", "other_tables", "long", "scratch", "short"]
    leads = pairs(suite, ["mlm", "scratch", "long"])["leads"]
    assert leads[0] == [None, None] and leads[1][0] is not None
    assert any("losses of different tasks do not compare" in note for note in results["notes"])


def test_the_page_has_the_tables_and_figures_of_stages(make_stages: Callable[..., Path]) -> None:
    folder = make_stages((1,))
    report = write_report(folder)
    page = report.report_html.read_text()
    for words in (
        "Ledger",
        "Saved at equal loss",
        "mlm, then frozen for 25 %",
        "Copying emerges at step",
        "first of gap",
    ):
        assert words in page
    for name in ("loss_over_flops", "copying", "ledger"):
        assert (folder / "figures" / f"{name}.svg").is_file()


def test_what_a_run_has_inherited_may_not_be_known(make_stages: Callable[..., Path]) -> None:
    folder = make_stages((1,))
    file = folder / "long-seed1" / "summary.json"
    summary = json.loads(file.read_text())
    summary["ledger"] |= {"inherited_flops": None, "inherited_layer_units": None}
    file.write_text(json.dumps(summary))
    report = write_report(folder)
    ledger = report.results["stages"]["ledger"]
    assert ledger["long"]["inherited_flops"] is None and ledger["short"]["inherited_flops"]["mean"] == 100
    (table,) = (table for table in stage_tables(report.results) if table.title == "Ledger")
    (row,) = ([cell.text for cell in row] for row in table.rows if row[0].text == "long")
    assert row[-3:] == ["not known"] * 3
    assert "not known" in report.report_html.read_text()


def test_a_causal_suite_has_no_stages(make_suite: Callable[..., Path]) -> None:
    folder = make_suite()
    assert "stages" not in write_report(folder).results
    assert not (folder / "figures" / "ledger.svg").exists()
