"""The numbers of results.json beyond losses and counts, against the closed forms of constructed runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_testbed.launcher.report.numbers.causal import redundancy
from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.report.read.records import read_suite

MakeSuite = Callable[..., Path]

LABELS = ("reference", "permuted_reference", "top_k_global", "hash", "dense")
CHANCE = 1 / 8


@pytest.fixture
def runs(make_suite: MakeSuite) -> dict[str, Any]:
    return {run["label"]: run for run in read_results(make_suite(labels=LABELS))["runs"]}


def means(stat: dict[str, Any]) -> list[float]:
    return [stat["mean"], *(layer["mean"] for layer in stat["layers"])]


def test_the_reference_agrees_with_itself_and_chance_does_not(runs: dict[str, Any]) -> None:
    assert means(runs["reference"]["agreement"]["precision"]) == pytest.approx([1, 1, 1])
    assert means(runs["reference"]["agreement"]["regret"]) == pytest.approx([0, 0, 0])
    assert runs["reference"]["agreement"]["coverage"]["mean"] == pytest.approx(1)
    assert runs["permuted_reference"]["agreement"]["precision"]["mean"] == pytest.approx(CHANCE, abs=0.03)
    assert runs["dense"]["agreement"] is None


def test_scores_and_vectors(runs: dict[str, Any]) -> None:
    measures = runs["top_k_global"]["router_measures"]
    assert means(measures["mean_token_entropy"]) == pytest.approx([math.log(32) * 0.45] * 3)
    assert means(measures["mean_margin"]) == pytest.approx([0.25 * 0.55] * 3)
    assert means(measures["router_cosine"]) == pytest.approx([0.1] * 3)
    used = runs["top_k_global"]["routing"]["top_k"]["normalised_effective_experts"]["mean"]
    assert measures["entropy_of_mean"]["mean"] == pytest.approx(math.log(32) * used)
    assert runs["hash"]["router_measures"] is None


def test_partners_and_words(runs: dict[str, Any], make_suite: MakeSuite) -> None:
    pairs = runs["reference"]["coactivation"]
    # Neighbours share half of what the lesser of them has, and nobody else meets.
    assert 0.4 < pairs["mean_strongest_share"]["mean"] < 0.5
    assert pairs["mean_share"]["mean"] == pytest.approx(pairs["mean_strongest_share"]["mean"] / 31, rel=1e-6)
    words = runs["top_k_global"]["vocabulary"]
    assert words["token_ids"] == 40
    # The ids choose alike, so that what they seem to tell is chance.
    assert words["token_information"]["mean"] == pytest.approx(words["token_information_chance"]["mean"], abs=0.03)


def test_causes_are_those_put_in(runs: dict[str, Any]) -> None:
    special, none = runs["top_k_global"]["causes"], runs["permuted_reference"]["causes"]
    own, other = 0.01 + 0.1 * 0.55, 0.01
    assert (special["sequences"], special["experts"], special["experts_in_all"]) == (16, 64, 64)
    assert means(special["specificity"]) == pytest.approx([own / (own + 7 * other)] * 3)
    assert means(none["specificity"]) == pytest.approx([CHANCE] * 3)
    assert special["ablation_damage"]["mean"] == pytest.approx(own)
    assert special["mean_replacement_damage"]["mean"] == pytest.approx(own / 2)
    assert special["keep_only_group"]["mean"] == pytest.approx(0.02)
    assert special["keep_only_group_by_domain"]["music"]["mean"] == pytest.approx(0.02)
    assert special["forced_elsewhere"]["mean"] == pytest.approx(0.57)
    expected = np.full((8, 8), 0.57) - 0.55 * np.eye(8)
    assert np.array(special["forced_matrix"]) == pytest.approx(expected)
    assert np.array(special["ablation_matrix"]) == pytest.approx(np.full((8, 8), other) + (own - other) * np.eye(8))
    for name in ("specificity", "ablation_damage", "keep_only_group", "forced_elsewhere"):
        assert special[name]["over"] == "evaluation sequences"
        assert special[name]["low"] == pytest.approx(special[name]["mean"])


def test_the_interval_of_damage_is_that_of_resampled_sequences(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("reference",), num_layers=1)
    path = suite / "reference-seed1" / "analysis.npz"
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    # In each domain one of two sequences suffers by 0.2 without any expert, the other by nothing.
    content["ablation_loss_YEN"] = np.tile(content["baseline_loss_N"] + 0.2 * (np.arange(16) % 2), (1, 32, 1))
    np.savez(path, **content)
    damage = read_results(suite)["runs"][0]["causes"]["ablation_damage"]
    # The mean over the domains' owners of a binomial of 2 draws at a half, times 0.1.
    owned_D = np.bincount(content["owner_YE"][0], minlength=8) / 32
    spread = 0.1 * math.sqrt(0.5 * np.sum(owned_D**2))
    assert damage["mean"] == pytest.approx(0.1)
    assert (damage["high"] - damage["low"]) / 2 == pytest.approx(1.96 * spread, rel=0.3)


def test_redundancy_is_a_mean_over_pairs(runs: dict[str, Any]) -> None:
    found = runs["reference"]["redundancy"]
    for name in ("expert_cosine", "expert_cka", "weight_cosine"):
        assert means(found[name]) == pytest.approx([0.25] * 3)
    assert means(found["effective_rank"]) == pytest.approx([16] * 3)
    assert found["tokens"] == 512
    assert runs["dense"]["redundancy"] is None


def test_cka_has_a_level_of_chance_where_the_width_is_known(make_suite: MakeSuite) -> None:
    (training,) = read_suite(make_suite(labels=("reference",), num_layers=1)).trainings
    assert training.ablation is not None
    found = redundancy([training.ablation], [128])
    assert found is not None and found["cka_chance"]["mean"] == pytest.approx(128 / (512 + 128))
    for widths in ([None], ["wide"], []):
        unknown = redundancy([training.ablation], widths)
        assert unknown is not None and unknown["cka_chance"] is None


def test_curves_over_training(runs: dict[str, Any]) -> None:
    course = runs["top_k_global"]["over_training"]
    assert course["steps"] == [50 * look for look in range(1, 9)]
    assert course["curves"]["saturation"]["mean"] == pytest.approx([look / 8 for look in range(1, 9)])
    # Those that were undecided before have changed, to their final choice or to another wrong one.
    changed = [None] + [1 - (look - 1) / 8 for look in range(2, 9)]
    assert course["curves"]["fluctuation"]["mean"] == pytest.approx(changed)
    assert np.all(np.diff(course["curves"]["domain_information"]["mean"]) > 0)
    assert np.all(np.diff(course["curves"]["max_violation"]["mean"]) > 0)
    assert course["settled_step"]["mean"] is None  # nine tenths are reached at the end only
    assert runs["dense"]["over_training"] is None


def test_curves_have_the_range_of_the_seeds(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("top_k_global",), seeds=(1, 2, 3), num_layers=1)
    (suite / "top_k_global-seed2" / "statistics" / "step_00000100.npz").unlink()
    course = read_results(suite)["runs"][0]["over_training"]
    assert course["seeds"] == 3
    assert course["steps"] == [50, *range(150, 401, 50)]
    curve = course["curves"]["domain_information"]
    assert np.all(np.array(curve["low"]) < curve["mean"]) and np.all(np.array(curve["mean"]) < curve["high"])


def test_a_layer_settles_where_it_stays(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("reference",), num_layers=2)
    folder = suite / "reference-seed1" / "statistics"
    with np.load(folder / "step_00000400.npz") as arrays:
        final_YTW = arrays["expert_ids_YTW"]
    for step in (250, 300, 350):
        path = folder / f"step_{step:08d}.npz"
        with np.load(path) as arrays:
            content = {name: arrays[name] for name in arrays.files}
        content["expert_ids_YTW"][0] = final_YTW[0]
        np.savez(path, **content)
    layers = read_results(suite)["runs"][0]["over_training"]["settled_step"]["layers"]
    assert [layer["mean"] for layer in layers] == [250, None]


def test_headline_numbers_have_bounds(make_suite: MakeSuite) -> None:
    for name, seeds, over in (("one", (1,), "documents"), ("many", (1, 2, 3), "seeds")):
        results = read_results(make_suite(name, labels=LABELS[:3], seeds=seeds))
        run = results["runs"][2]
        top_k = run["routing"]["top_k"]
        names = ("domain_information", "domain_information_above_shuffled", "normalised_effective_experts")
        for stat in (run["loss"], *(top_k[name] for name in names)):
            assert stat["over"] == over
            assert stat["low"] <= stat["mean"] <= stat["high"]
        above, whole = top_k["domain_information_above_shuffled"], top_k["domain_information"]
        if over == "documents":
            # What chance adds is off these bounds already: taking off the shuffled level too would count it twice.
            assert above["mean"] < whole["mean"]
            assert above["low"] == min(whole["low"], above["mean"])
            assert above["high"] == max(whole["high"], above["mean"])
        else:
            values = [training["loss"] for training in run["trainings"]]
            assert min(values) <= run["loss"]["low"] < run["loss"]["high"] <= max(values)
        assert all(share["over"] == over for share in run["recovered_by_domain"].values())


def test_the_interval_of_the_loss_is_that_of_its_documents(make_suite: MakeSuite) -> None:
    suite = make_suite(labels=("reference",), num_layers=1)
    path = next((suite / "reference-seed1" / "evaluations").glob("*"))
    with np.load(path) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    # Documents of two sequences each, alike within: half of them at 2, half at 4.
    content["sequence_loss_N"] = 2.0 + 2.0 * (content["sequence_cluster_N"] % 2)
    content["loss_sum_D"] = 3.0 * content["tokens_D"]
    np.savez(path, **content)
    loss = read_results(suite)["runs"][0]["loss"]
    # Eight domains of eight documents with a standard deviation of 1.
    assert loss["mean"] == pytest.approx(3)
    assert (loss["high"] - loss["low"]) / 2 == pytest.approx(1.96 / math.sqrt(64), rel=0.1)
