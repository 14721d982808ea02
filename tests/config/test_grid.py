"""Grids of suites against the product written out by hand."""

from pathlib import Path

import pytest

from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.errors import ConfigError

HEAD = "name: cross\nexperiment: configs/experiments/tiny.yaml\noverrides: {routing.balance: none}\n"
GRID = """
grid:
  choices:
    top1: {model.moe.top_k: 1}
    top2: {}
  router:
    learned: {routing.router: {name: top_k}, model.moe.num_experts: 16}
    fixed: {routing.router.name: hash}
"""
LAYERED = """
grid:
  size: {small: {model.moe.top_k: 1}}
  choices: {few: {model.moe.top_k: 3}}
reference: [small-few]
runs:
  small-few: {description: changed, overrides: {model.moe.num_experts: 8}}
  alone: {overrides: {model.moe.top_k: 4}}
"""


def load(tmp_path: Path, text: str) -> Suite:
    path = tmp_path / "cross.yaml"
    path.write_text(HEAD + text)
    return load_suite(path)


def test_every_combination_is_a_run(tmp_path: Path):
    suite = load(tmp_path, GRID)
    seen = {
        label: (run.model.moe.top_k, run.routing.router.name, run.model.moe.num_experts)
        for (label, _), run in suite.experiments.items()
    }
    assert seen == {
        "top1-learned": (1, "top_k", 16),
        "top1-fixed": (1, "hash", 32),
        "top2-learned": (2, "top_k", 16),
        "top2-fixed": (2, "hash", 32),
    }
    assert list(suite.config.runs) == list(seen)
    assert suite.config.grid == {}
    assert suite.config.runs["top1-fixed"].description == "choices top1, router fixed"


def test_a_later_axis_wins_and_a_listed_run_changes_its_combination(tmp_path: Path):
    suite = load(tmp_path, LAYERED)
    assert suite.experiments["small-few", 1].model.moe.top_k == 3
    assert suite.experiments["small-few", 1].model.moe.num_experts == 8
    assert suite.config.runs["small-few"].description == "changed"
    assert suite.experiments["alone", 1].model.moe.top_k == 4


@pytest.mark.parametrize("grid", ["grid: 3", "grid: {choices: [1, 2]}", "grid: {choices: {}}", "grid: {a: {b: 1}}"])
def test_another_form_is_refused_with_the_place(tmp_path: Path, grid: str):
    with pytest.raises(ConfigError, match=r"cross\.yaml:4: grid.* is .*; expected axis -> label -> overrides"):
        load(tmp_path, grid + "\n")


def test_an_old_key_of_the_grid_and_one_of_a_listed_run_are_the_same(tmp_path: Path):
    text = LAYERED.replace("model.moe.top_k: 1", "statistics.points: 7").replace(
        "model.moe.num_experts: 8", "statistics.points: 5"
    )
    suite = load(tmp_path, text)
    assert suite.experiments["small-few", 1].probe.points == 5
