"""Experts in an encoder and in a decoder: what is recorded of each stack, and what remains of the encoder's routing
when a model starts from it and frees it partway.

Shape legend: Y MoE layers, T tokens of the probe, W places for choices, D domains, E experts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.report.numbers.results import read_results
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.routing.metrics import COUNTS, REPORTED
from tests.train import driver
from tests.train.results import read_evaluations, read_metrics
from tests.train.stacks import evaluate, tokens_naively

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

STEPS, FROZEN = 8, 4
ROUTINGS = {
    "reference": {"router": {"name": "reference"}, "balance": "none"},
    "top_k": {"router": {"name": "top_k"}, "balance": {"load_balancing_loss": {"scope": "global_batch"}}},
}
TRACKED = [metric for metric in REPORTED if metric.tracked and metric.of == COUNTS]


@pytest.fixture(scope="module")
def make_stage(make_experiment: MakeExperiment) -> MakeExperiment:
    """The config of an encoder, or of an encoder-decoder model, with two layers of experts in each stack."""

    def make(architecture: str, router: str, **parts: Any) -> dict[str, Any]:
        base = make_experiment()
        return make_experiment(
            **{
                "model": base["model"] | {"architecture": architecture},
                "objective": {"name": {"encoder": "masked", "encoder_decoder": "denoising"}[architecture]},
                "training": base["training"] | {"steps": STEPS, "learning_rate": 0.05},
                "routing": ROUTINGS[router],
                "probe": {"points": STEPS, "sequences_per_domain": 2},
                **parts,
            }
        )

    return make


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
@pytest.mark.parametrize("router", list(ROUTINGS))
def test_counts_of_each_stack_equal_loops_over_tokens(
    router: str, architecture: str, make_stage: MakeExperiment, run_on_ranks: Run
) -> None:
    config = make_stage(architecture, router)
    ((arrays, values),) = run_on_ranks(evaluate, 1, config)
    (tokens,) = run_on_ranks(tokens_naively, 1, config)
    stacks = ["encoder", "decoder"] if architecture == "encoder_decoder" else ["encoder"]
    places = [(stack, layer) for stack in stacks for layer in (0, 1)]
    assert len(arrays["counts_top_k_YDE"]) == len(places)
    for y, place in enumerate(places):
        routed_D, counts_DE = np.zeros(3, dtype=int), np.zeros((3, 8), dtype=int)
        for (*of_place, domain, experts), number in tokens.items():
            if tuple(of_place) == place:
                routed_D[domain] += number
                for expert in experts:
                    counts_DE[domain, expert] += number
        assert arrays["routed_tokens_YD"][y].tolist() == routed_D.tolist()
        assert arrays["counts_top_k_YDE"][y].tolist() == counts_DE.tolist()
    # Deletion shortens what the encoder reads; of masked tokens only some are to be predicted.
    assert (arrays["routed_tokens_YD"][0] != arrays["tokens_D"]).all()
    for stack in stacks:
        of_stack = [y for y, (name, _) in enumerate(places) if name == stack]
        for metric in TRACKED:
            assert metric.function is not None
            expected = np.mean([metric.function(arrays["counts_top_k_YDE"][y]) for y in of_stack])
            assert values[f"{stack}/{metric.name}"] == pytest.approx(expected), metric.name
    assert any(key.startswith("decoder/") for key in values) == (architecture == "encoder_decoder")


@pytest.mark.parametrize("router", list(ROUTINGS))
def test_what_remains_of_the_encoders_routing_when_it_is_freed(
    router: str, make_stage: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """While the encoder is still all of its routing is that of before the first step; after that, as loops count it."""
    suite = tmp_path / "suite"
    run_on_ranks(driver.train, 1, make_stage("encoder", router), str(suite / "mlm-seed1"))
    freeze = {"encoder": {"until": FROZEN / STEPS, "warmup_steps": 0}}
    child = make_stage("encoder_decoder", router, start={"encoder": {"run": "mlm"}}, freeze=freeze)
    run_on_ranks(driver.train, 1, child, str(suite / "child-seed1"))
    run_on_ranks(driver.train, 1, child | {"probe": {"points": 0}}, str(suite / "unseen-seed1"))
    assert read_metrics(suite / "unseen-seed1") == read_metrics(suite / "child-seed1"), "looking leaves no trace"
    assert not list((suite / "unseen-seed1" / "statistics").iterdir())
    runs = {label: {"description": "", "overrides": {}} for label in ("mlm", "child")}
    (suite / "suite.yaml").write_text(yaml.safe_dump({"name": "suite", "seeds": [1], "runs": runs}))

    assert not (suite / "mlm-seed1" / "statistics" / "step_00000000.npz").exists(), "it starts from its seed"
    files = sorted((suite / "child-seed1" / "statistics").iterdir())
    probes = [dict(np.load(file)) for file in files]
    assert [int(probe["step"]) for probe in probes] == list(range(STEPS + 1))
    encoder_YTW = [probe["expert_ids_YTW"][:2] for probe in probes]
    for step in range(FROZEN + 1):
        assert np.array_equal(encoder_YTW[step], encoder_YTW[0])
    assert not np.array_equal(probes[FROZEN]["expert_ids_YTW"][2:], probes[0]["expert_ids_YTW"][2:])
    assert not np.array_equal(encoder_YTW[STEPS], encoder_YTW[0])

    results = read_results(suite)
    kept = next(run for run in results["runs"] if run["label"] == "child")["routing_kept"]
    firsts, sets = kept_by_loops(encoder_YTW[STEPS], encoder_YTW[0])
    assert kept["first_choice_kept"]["mean"] == pytest.approx(np.mean(firsts))
    assert kept["choices_kept"]["mean"] == pytest.approx(np.mean(sets))
    curves = kept["over_training"]["curves"]
    assert kept["over_training"]["steps"] == list(range(STEPS + 1))
    for step, ids_YTW in enumerate(encoder_YTW):
        firsts, sets = kept_by_loops(ids_YTW, encoder_YTW[0])
        assert curves["first_choice_kept"]["mean"][step] == pytest.approx(np.mean(firsts))
        assert curves["choices_kept"]["mean"][step] == pytest.approx(np.mean(sets))
    domain_T = probes[0]["domain_T"]
    chances = []
    for d, domain in enumerate(results["domains"]):
        of_domain = domain_T == d
        firsts, _ = kept_by_loops(encoder_YTW[STEPS][:, of_domain], encoder_YTW[0][:, of_domain])
        assert kept["first_choice_kept_by_domain"][domain]["mean"] == pytest.approx(np.mean(firsts))
        chances.append(kept["first_choice_kept_chance_by_domain"][domain]["mean"])
    # Where each domain has its experts, the domain alone keeps more than loads do.
    if router == "reference":
        assert np.mean(chances) > 2 * kept["first_choice_kept_chance"]["mean"]

    # Two layers in each stack, those of the encoder forward only in the first half of the steps.
    ledger = RunFolder(suite / "child-seed1").read_summary().ledger
    assert ledger is not None
    expected = {"encoder": pytest.approx(2 * (FROZEN / 3 + STEPS - FROZEN)), "decoder": 2 * STEPS}
    assert ledger["layer_units_by_part"] == expected and ledger["inherited_layer_units"] == 2 * STEPS
    assert ledger["layer_units"] == pytest.approx(sum(ledger["layer_units_by_part"].values()))

    last = max(read_evaluations(suite / "child-seed1").items())[1]
    line = [line for line in read_metrics(suite / "child-seed1") if line["kind"] == "evaluation"][-1]
    for stack, layers in {"encoder": (0, 1), "decoder": (2, 3)}.items():
        for metric in TRACKED:
            assert metric.function is not None
            expected = np.mean([metric.function(last["counts_top_k_YDE"][y]) for y in layers])
            assert line[f"{stack}/{metric.name}"] == pytest.approx(expected), metric.name
        told = next(run for run in results["runs"] if run["label"] == "child")["stacks"][stack]
        expected = line[f"{stack}/domain_information"]
        assert told["routing"]["top_k"]["domain_information"]["mean"] == pytest.approx(expected)
        assert told["experts_per_token"]["mean"] == 2


def kept_by_loops(now_YTW: Any, before_YTW: Any) -> tuple[list[bool], list[float]]:
    """Of each decision whether its first choice, and what share of its experts, is that of before."""
    firsts, sets = [], []
    for now_TW, before_TW in zip(now_YTW.tolist(), before_YTW.tolist(), strict=True):
        for now, before in zip(now_TW, before_TW, strict=True):
            firsts.append(now[0] == before[0])
            shared = Counter(now) & Counter(before)
            sets.append(sum(shared.values()) / len(now))
    return firsts, sets
