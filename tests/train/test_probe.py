"""What is looked at over a training: by loops, on several ranks, and without any trace in the training.

Shape legend: T tokens of the probe, W places for choices, Y MoE layers, D domains, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.probe import Probe
from moe_testbed.routing.records import NO_EXPERT
from tests.train import driver
from tests.train.probes import count_the_first_step, probe_at_the_start, probe_naively
from tests.train.results import read_metrics, read_weights

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]


def read_statistics(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> arrays."""
    paths = sorted((run_dir / "statistics").iterdir())
    return {int(arrays["step"]): arrays for arrays in (dict(np.load(path)) for path in paths)}


def test_training_is_the_same_whether_it_is_looked_at_or_not(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    looks = {"points": 32, "sequences_per_domain": 2}
    often = make_experiment(probe=looks, ablation={"sequences_per_domain": 2})
    run_on_ranks(driver.train, 1, often, str(tmp_path / "often"))
    never = make_experiment(probe={"points": 0}, ablation={"sequences_per_domain": 0})
    run_on_ranks(driver.train, 1, never, str(tmp_path / "never"))
    assert read_metrics(tmp_path / "often") == read_metrics(tmp_path / "never")
    torch.testing.assert_close(read_weights(tmp_path / "often"), read_weights(tmp_path / "never"), rtol=0, atol=0)
    # Fewer steps than points: each is looked at.
    assert list(read_statistics(tmp_path / "often")) == [1, 2, 3, 4, 5, 6]
    assert not read_statistics(tmp_path / "never")
    assert (tmp_path / "often" / "analysis.npz").exists() and not (tmp_path / "never" / "analysis.npz").exists()


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("router", ["top_k", "relu"])
def test_the_probe_is_the_first_sequences_of_each_domain(
    router: str, num_ranks: int, make_experiment: MakeExperiment, run_on_ranks: Run
) -> None:
    config = make_experiment(
        probe={"sequences_per_domain": 3},
        routing={"router": {"name": router}, "balance": {}},
        training=make_experiment()["training"] | {"micro_batch_size": 4, "global_batch_size": 8},
    )
    (naive,) = run_on_ranks(probe_naively, 1, config)
    for arrays in run_on_ranks(probe_at_the_start, num_ranks, config):
        ids_YTW = arrays["expert_ids_YTW"]
        assert ids_YTW.dtype == np.int16 and ids_YTW.shape[:2] == (2, 3 * 3 * 16)
        assert arrays["domain_T"].tolist() == [d for _ in range(3) for d in range(3) for _ in range(16)]
        for layer, expected in zip(ids_YTW.tolist(), naive, strict=True):
            assert [[e for e in ids if e != NO_EXPERT] for ids in layer] == expected
        assert ids_YTW.shape[2] == max(len(ids) for layer in naive for ids in layer)


@pytest.mark.parametrize(("num_ranks", "expert_parallel"), [(1, 1), (2, 2)])
def test_the_load_is_that_of_the_global_batch(
    num_ranks: int,
    expert_parallel: int,
    data: dict[str, Any],
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    """Two micro-batches of two sequences on two ranks, or four on one; a domain is unlabelled."""
    domains = data["mix"]["domains"]
    mix = data["mix"] | {"domains": domains | {"greek": domains["greek"] | {"labelled": False}}}
    config = make_experiment(
        data={"mix": mix, "packing": "packed", "pieces_per_sequence": 4},
        training=make_experiment()["training"] | {"micro_batch_size": 2},
        parallel={"expert_parallel_size": expert_parallel},
        probe={"points": 6},
    )
    run_on_ranks(driver.train, num_ranks, config, str(tmp_path / "run"))
    (expected,) = run_on_ranks(count_the_first_step, 1, config | {"parallel": {"expert_parallel_size": 1}})
    statistics = read_statistics(tmp_path / "run")
    counts_YDE = statistics[1]["counts_top_k_YDE"]
    found = {tuple(map(int, where)): int(counts_YDE[tuple(where)]) for where in np.argwhere(counts_YDE)}
    assert found == expected
    # Each look counts its own step only: two thirds of the assignments, and not more by the step.
    for arrays in statistics.values():
        assert arrays["counts_top_k_YDE"].sum() == pytest.approx(2 / 3 * 2 * 2 * 8 * 16, rel=0.1)


def test_looks_are_evenly_spaced_and_the_last_step_is_one(make_experiment: MakeExperiment) -> None:
    def looks(steps: int, points: int) -> list[int]:
        experiment = ExperimentConfig.model_validate(
            make_experiment(training={"steps": steps}, probe={"points": points})
        )
        store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
        held_out = EvaluationSet.of(store, "validation", 16, 1)
        probe = Probe(experiment, held_out, Ranks(0, 1, torch.device("cpu"), None))
        return [step for step in range(1, steps + 1) if probe.is_due(step)]

    assert looks(9, 3) == [3, 6, 9]
    assert looks(10, 4) == [3, 5, 8, 10]
    assert looks(5, 1) == [5]
    assert looks(5, 0) == []
    many = looks(500, 32)
    assert len(many) == 32 and many[-1] == 500 and set(np.diff(many)) == {15, 16}
