"""The leads of all pairs, against `gap.lead` of each pair."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moe_testbed.launcher.report.numbers.pairwise import lead_rows, pairs
from moe_testbed.launcher.report.read.records import Suite, read_suite
from moe_testbed.routing.metrics import gap

MakeSuite = Callable[..., Path]
LABELS = ["reference", "permuted_reference", "top_k_global", "hash", "broken"]


def lead(suite: Suite, one: str, other: str, seeds: list[int]) -> tuple[float, float, float, str]:
    """The lead of one pair by itself."""
    runs = [[suite.evaluations(label)[seed] for seed in seeds] for label in (one, other)]
    losses = [np.stack([evaluation.sequence_loss_N for evaluation in run]) for run in runs]
    first = runs[0][0]
    found = gap.lead(*losses, first.sequence_domain_N, first.sequence_cluster_N)
    return found.value, found.low, found.high, found.over


@pytest.mark.parametrize("seeds", [(1,), (1, 2, 3)])
def test_every_pair_has_the_lead_that_it_has_by_itself(make_suite: MakeSuite, seeds: tuple[int, ...]) -> None:
    suite = read_suite(make_suite(labels=tuple(LABELS), seeds=seeds, num_layers=1))
    content = pairs(suite, LABELS)
    for i, one in enumerate(LABELS[:4]):
        for j, other in enumerate(LABELS[i + 1 : 4], start=i + 1):
            *numbers, over = content["leads"][i][j - i - 1]
            *expected, unit = lead(suite, one, other, list(seeds))
            np.testing.assert_allclose(numbers, expected, rtol=1e-6, atol=1e-8)
            assert content["over"][over] == unit
    assert [row[-1] for row in content["leads"][:4]] == [None] * 4


def test_a_pair_is_compared_over_the_seeds_that_both_finished(make_suite: MakeSuite) -> None:
    folder = make_suite(labels=tuple(LABELS[:4]), seeds=(1, 2, 3), num_layers=1)
    (folder / "hash-seed2" / "status.json").unlink()
    for seed in (2, 3):
        (folder / f"top_k_global-seed{seed}" / "status.json").unlink()
    suite = read_suite(folder)
    rows = {(one, other): tuple(row) for one, other, *row in lead_rows(suite, LABELS[:4])}
    assert len(rows) == 6
    for (one, other), seeds in {
        ("reference", "permuted_reference"): [1, 2, 3],
        ("reference", "hash"): [1, 3],
        ("top_k_global", "hash"): [1],
        ("permuted_reference", "top_k_global"): [1],
    }.items():
        *numbers, over = rows[one, other]
        *expected, unit = lead(suite, one, other, seeds)
        np.testing.assert_allclose(numbers, expected, rtol=1e-6, atol=1e-8)
        assert over == unit


def test_no_runs_no_pairs(make_suite: MakeSuite) -> None:
    suite = read_suite(make_suite(labels=("broken", "late")))
    assert pairs(suite, ["broken", "late"]) == {"over": [], "leads": [[None], []]}
    assert pairs(suite, []) == {"over": [], "leads": []}
