"""The evaluator against loops over sequences and tokens.

Shape legend: N evaluated sequences, D domains, E experts, Y MoE layers, K choices, L positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from moe_testbed.data.build import build_store
from moe_testbed.data.tokens.held_out import evaluation_batches
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.evaluation import Evaluator, evaluation_values
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING
from moe_testbed.routing.metrics import COUNTS, REPORTED


def evaluate(config: dict[str, Any]) -> dict[str, Any]:
    """What the evaluator says of the untrained model."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    size = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    evaluation = experiment.evaluation
    sequences = EvaluationSet.of(
        store, evaluation.split, experiment.data.sequence_length, evaluation.sequences_per_domain
    )
    return Evaluator(experiment, sequences, ranks).run(build_model(experiment, store, ranks), step=0).arrays()


def evaluate_naively(config: dict[str, Any]) -> dict[str, Any]:
    """The same, one sequence at a time, counted in Python."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    model = build_model(experiment, store, Ranks(0, 1, torch.device("cpu"), None)).eval()
    evaluation, length = experiment.evaluation, experiment.data.sequence_length
    result: dict[str, Any] = {"sequence_loss": [], "domain": [], "top_1": Counter(), "top_k": Counter()}
    result["violation"], result["cluster"], result["main_document"] = Counter(), Counter(), []
    result["weight"], result["entropy"], result["token_ids"] = Counter(), Counter(), Counter()
    result["first_choices"], result["together"] = Counter(), Counter()
    for batch in evaluation_batches(store, evaluation.split, length, evaluation.sequences_per_domain, batch_size=1):
        # By the text: whose tokens are these?
        start = int(store.document_starts[batch.document_BL[0, 0]])
        regions = store.regions[evaluation.split]
        domain = next(d for d, r in enumerate(regions) if r.first_token <= start < r.end_token)
        with torch.no_grad():
            output = model(*LANGUAGE_MODELLING(batch, slice(None), 0, torch.device("cpu")).arguments)
        result["sequence_loss"].append(float(output.cross_entropy_BL.double().mean()))
        result["domain"].append(domain)
        ids = batch.token_ids_BL[0].tolist()
        result["token_ids"].update(ids)
        tokens_of = Counter(batch.document_BL[0].tolist())
        main_document = min(tokens_of, key=lambda document: (-tokens_of[document], document))
        result["main_document"].append(main_document)
        for layer, routing in enumerate(output.layers):
            chosen = routing.decision.expert_ids_TK.tolist()
            # Largest over mean load, less 1, of the sequence and of each of its documents, weighted by tokens.
            documents = batch.document_BL[0].tolist()
            for scope, sets in (("sequence", [0] * length), ("document", documents)):
                for one in set(sets):
                    own = [experts for experts, number in zip(chosen, sets, strict=True) if number == one]
                    loads = Counter(expert for experts in own for expert in experts)
                    mean = sum(loads.values()) / experiment.model.moe.num_experts
                    result["violation"][scope, layer] += len(own) * (max(loads.values()) / mean - 1)
            decision = routing.decision
            for token, experts, weights, p in zip(
                ids, chosen, decision.weights_TK.tolist(), decision.probabilities_TE.tolist(), strict=True
            ):
                result["first_choices"][layer, token, experts[0]] += 1
                result["cluster"].update((layer, main_document, expert) for expert in experts)
                result["together"].update((layer, i, j) for i in experts for j in experts)
                for expert, weight in zip(experts, weights, strict=True):
                    result["weight"][layer, domain, expert] += weight
                result["entropy"][layer, domain] -= sum(x * math.log(x) for x in p)
            for experts in chosen:
                result["top_1"][layer, domain, experts[0]] += 1
                result["top_k"].update((layer, domain, expert) for expert in experts)
    return result


def as_counter(counts_YDE: Any) -> Counter[tuple[int, ...]]:
    return Counter({tuple(map(int, where)): int(counts_YDE[tuple(where)]) for where in np.argwhere(counts_YDE)})


@pytest.fixture
def make_config(make_experiment: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """15 sequences; 2 ranks take 6 at a time, so that the last 3 are shared unevenly."""

    def make(**parts: Any) -> dict[str, Any]:
        return make_experiment(
            training=make_experiment()["training"] | {"micro_batch_size": 3, "global_batch_size": 6}, **parts
        )

    return make


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("labelled", [True, False])
def test_tables_equal_loops(
    num_ranks: int,
    labelled: bool,
    make_config: Callable[..., dict[str, Any]],
    data: dict[str, Any],
    run_on_ranks: Callable[..., list[Any]],
) -> None:
    domains = data["mix"]["domains"]
    if not labelled:
        # The router may not know the domain; the table tells it all the same.
        domains = domains | {"greek": domains["greek"] | {"labelled": False}}
    config = make_config(data={"mix": data["mix"] | {"domains": domains}})
    (naive,) = run_on_ranks(evaluate_naively, 1, config)
    results = run_on_ranks(evaluate, num_ranks, config)
    for arrays in results:
        np.testing.assert_allclose(arrays["sequence_loss_N"], naive["sequence_loss"], rtol=1e-6)
        assert arrays["sequence_domain_N"].tolist() == naive["domain"]
        assert arrays["tokens_D"].tolist() == [naive["domain"].count(d) * 16 for d in range(3)]
        for d in range(3):
            losses = [loss for loss, domain in zip(naive["sequence_loss"], naive["domain"], strict=True) if domain == d]
            np.testing.assert_allclose(arrays["loss_sum_D"][d], sum(losses) * 16, rtol=1e-6)
        assert as_counter(arrays["counts_top_1_YDE"]) == naive["top_1"]
        assert as_counter(arrays["counts_top_k_YDE"]) == naive["top_k"]
        assert not arrays["dropped_YDE"].any()
        expected_SY = [[naive["violation"][scope, y] for y in range(2)] for scope in ("sequence", "document")]
        np.testing.assert_allclose(arrays["violation_sum_SY"], expected_SY, rtol=1e-5)
        # Permuted labels: the same tokens of every label, the same load of every expert.
        shuffled_YDE, counts_YDE = arrays["shuffled_counts_top_k_YDE"], arrays["counts_top_k_YDE"]
        np.testing.assert_array_equal(shuffled_YDE.sum(1), counts_YDE.sum(1))
        np.testing.assert_array_equal(shuffled_YDE.sum(2), counts_YDE.sum(2))
        assert (shuffled_YDE != counts_YDE).any()
        # By document: numbered by the first token of the text that they are from.
        documents = sorted(set(naive["main_document"]))
        assert arrays["sequence_cluster_N"].tolist() == [documents.index(one) for one in naive["main_document"]]
        for n, cluster in enumerate(arrays["sequence_cluster_N"]):
            assert arrays["cluster_domain_C"][cluster] == naive["domain"][n]
        expected = {(y, documents.index(one), e): count for (y, one, e), count in naive["cluster"].items()}
        assert as_counter(arrays["cluster_counts_YCE"]) == expected
        assert 3 < len(documents) < 15
        assert as_counter(arrays["coactivation_YEE"]) == naive["together"]
        for name in ("weight", "entropy"):
            array = arrays["weight_YDE" if name == "weight" else "entropy_sum_YD"]
            for where in np.ndindex(array.shape):
                np.testing.assert_allclose(array[where], naive[name][where], rtol=1e-5)
        seen = naive["token_ids"]
        tracked = sorted((one for one in seen if seen[one] >= 10), key=lambda one: (-seen[one], one))
        assert arrays["vocabulary_ids_V"].tolist() == tracked and tracked
        rows = {(y, tracked.index(one), e): n for (y, one, e), n in naive["first_choices"].items() if one in tracked}
        assert as_counter(arrays["vocabulary_counts_YVE"]) == rows


def test_capacity_drops_are_counted(
    make_config: Callable[..., dict[str, Any]], run_on_ranks: Callable[..., list[Any]]
) -> None:
    base = make_config()
    moe = base["model"]["moe"] | {"dispatch": "capacity", "capacity_factor": 0.5}
    (arrays,) = run_on_ranks(evaluate, 1, make_config(model=base["model"] | {"moe": moe}))
    kept_YDE = arrays["counts_top_k_YDE"] - arrays["dropped_YDE"]
    assert (kept_YDE >= 0).all() and arrays["dropped_YDE"].any()
    # 15 sequences of 16 tokens by 3: 5 batches of 48 tokens, capacity 0.5 * 2 * 48 / 8 = 6 per expert.
    assert kept_YDE.sum(1).max() <= 5 * 6


def test_a_dense_baseline_has_losses_and_no_counts(
    make_config: Callable[..., dict[str, Any]], run_on_ranks: Callable[..., list[Any]]
) -> None:
    base = make_config()
    for arrays in run_on_ranks(evaluate, 2, make_config(model=base["model"] | {"dense_baseline": True})):
        assert arrays["counts_top_k_YDE"].shape == (0, 3, 8)
        assert arrays["tokens_D"].tolist() == [80, 80, 80]


def test_the_line_is_the_mean_over_domains_of_equal_weight() -> None:
    # Two layers: every domain has an expert of its own; both use both alike.
    counts_YDE = np.array([[[10, 0], [0, 30]], [[5, 5], [15, 15]]])
    evaluation = Evaluation(
        step=7,
        domains=("a", "b"),
        tokens_D=np.array([10, 30]),
        loss_sum_D=np.array([20.0, 30.0]),
        sequence_loss_N=np.array([2.0, 1.0]),
        sequence_domain_N=np.array([0, 1]),
        counts_top_1_YDE=counts_YDE,
        counts_top_k_YDE=counts_YDE,
        dropped_YDE=np.zeros_like(counts_YDE),
        shuffled_counts_top_k_YDE=counts_YDE,
        # Sequences and documents, by layer: summed over the 40 tokens.
        violation_sum_SY=np.array([[40.0, 0.0], [20.0, 60.0]]),
    )
    line = MetricsLine("evaluation", 7, 1.5, evaluation_values(evaluation)).content()
    assert line.pop("kind") == "evaluation"
    expected = {
        "step": 7,
        "seconds": 1.5,
        "cross_entropy": 1.5,
        "cross_entropy/a": 2.0,
        "cross_entropy/b": 1.0,
        "domain_information": 0.5,
        "normalised_effective_experts": 1.0,
        "dead_experts": 0.0,
        "max_violation": 0.0,
        "max_violation/sequence": 0.5,
        "max_violation/document": 1.0,
    }
    tracked = {metric.name for metric in REPORTED if metric.tracked and metric.of == COUNTS}
    assert set(line) == set(expected) | tracked
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    without_experts = evaluation_values(replace(evaluation, counts_top_k_YDE=np.zeros((0, 2, 2), dtype=np.int64)))
    assert "domain_information" not in without_experts and without_experts["cross_entropy"] == 1.5
