"""Every family's routing, as recorded, against its router written down anew and a count token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_testbed.launcher.analyze.families import FAMILIES, find_routers, read_output
from moe_testbed.launcher.analyze.hub_model import load_hub_model
from moe_testbed.launcher.analyze.passages import Passages, Tokens, cut_passages
from moe_testbed.launcher.analyze.recorder import Recorder, active_parameters
from moe_testbed.launcher.errors import CheckpointError
from tests.analyze import models, oracles

CPU = torch.device("cpu")
LENGTH = 6


@pytest.fixture(scope="module")
def passages() -> Passages:
    # Documents of different lengths, so that batches have padding; 24 characters to a passage, of which 6 tokens count.
    return cut_passages(models.make_documents(per_domain=3, characters=20), LENGTH, per_domain=4)


def record(model: Any, passages: Passages, family: str, tokenizer: Any = None, length: int = LENGTH) -> dict[str, Any]:
    tokens = Tokens(tokenizer or models.make_tokenizer(), length)
    return Recorder(model, FAMILIES[family], passages, tokens, 5, CPU).run().arrays()


def input_of(text: str) -> list[int]:
    """<s> and the characters, as many as are read and one more."""
    return [1, *(len(models.SPECIAL) + models.CHARACTERS.index(character) for character in text)][: LENGTH + 1]


@pytest.mark.parametrize("name", models.CONFIGS)
def test_records_what_the_family_says(name: str, passages: Passages) -> None:
    model = models.make_model(name)
    family = models.CONFIGS[name][0]
    arrays = record(model, passages, family)

    routers = find_routers(model, FAMILIES[family])
    dense = 1 if family.startswith("deepseek") else 0
    assert [router.layer for router in routers] == list(range(dense, 2))
    top_1, top_k, clusters, vocabulary = Counter(), Counter(), Counter(), Counter()
    together, weight, probability, entropy, margin = Counter(), Counter(), Counter(), Counter(), Counter()
    tokens = [0] * len(passages.domains)
    losses = []
    for text, domain, cluster in zip(passages.texts, passages.domain_N, passages.cluster_N, strict=True):
        ids = input_of(text)
        seen: list[torch.Tensor] = []
        handles = [
            model.model.layers[router.layer].mlp.register_forward_pre_hook(
                lambda module, inputs, seen=seen: seen.append(inputs[0][0])
            )
            for router in routers
        ]
        with torch.no_grad():
            output = model(torch.tensor([ids[:-1]]))
        for handle in handles:
            handle.remove()
        # The first token is <s>: neither its routing nor its loss counts.
        losses.append(
            [-float(output.logits[0, p].double().log_softmax(-1)[ids[p + 1]]) for p in range(1, len(ids) - 1)]
        )
        tokens[domain] += len(ids) - 2
        for y, (router, hidden_LM) in enumerate(zip(routers, seen, strict=True)):
            for position in range(1, len(ids) - 1):
                experts, weights, probabilities_E = oracles.choose(
                    name, router.module, hidden_LM[position].double().numpy()
                )
                top_1[y, domain, experts[0]] += 1
                vocabulary[y, ids[position], experts[0]] += 1
                for expert, value in zip(experts, weights, strict=True):
                    top_k[y, domain, expert] += 1
                    clusters[y, cluster, expert] += 1
                    weight[y, domain, expert] += value
                    for other in experts:
                        together[y, expert, other] += 1
                for expert, value in enumerate(probabilities_E):
                    probability[y, domain, expert] += value
                entropy[y, domain] -= sum(value * np.log(value) for value in probabilities_E)
                highest = sorted(probabilities_E, reverse=True)
                margin[y, domain] += highest[len(experts) - 1] - highest[len(experts)]

    def table(counts: Counter[Any], like: str) -> np.ndarray[Any, Any]:
        filled = np.zeros(arrays[like].shape)
        for place, value in counts.items():
            filled[place] = value
        return filled

    assert arrays["tokens_D"].tolist() == tokens
    for counts, name_of in (
        (top_1, "counts_top_1_YDE"),
        (top_k, "counts_top_k_YDE"),
        (clusters, "cluster_counts_YCE"),
        (together, "coactivation_YEE"),
    ):
        np.testing.assert_array_equal(arrays[name_of], table(counts, name_of), err_msg=name_of)
    for counts, name_of in (
        (weight, "weight_YDE"),
        (probability, "probability_sum_YDE"),
        (entropy, "entropy_sum_YD"),
        (margin, "margin_sum_YD"),
    ):
        np.testing.assert_allclose(arrays[name_of], table(counts, name_of), rtol=1e-5, atol=1e-6, err_msg=name_of)
    for row, number in enumerate(arrays["vocabulary_ids_V"]):
        for y in range(len(routers)):
            expected = [vocabulary[y, number, expert] for expert in range(models.EXPERTS)]
            assert arrays["vocabulary_counts_YVE"][y, row].tolist() == expected
    sums = np.bincount(passages.domain_N, [np.sum(row) for row in losses])
    for row, domain, found in zip(losses, passages.domain_N, arrays["sequence_loss_N"], strict=True):
        per_token, passages_per_token = sums[domain] / tokens[domain], sum(passages.domain_N == domain) / tokens[domain]
        expected = per_token + sum(loss - per_token for loss in row) * passages_per_token
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(arrays["loss_sum_D"], sums, rtol=1e-5)
    assert not arrays["dropped_YDE"].any()


def test_batches_and_padding_change_nothing(passages: Passages) -> None:
    model = models.make_model("mixtral")
    one = Recorder(model, FAMILIES["mixtral"], passages, Tokens(models.make_tokenizer(), LENGTH), 1, CPU).run().arrays()
    many = (
        Recorder(model, FAMILIES["mixtral"], passages, Tokens(models.make_tokenizer(), LENGTH), 16, CPU).run().arrays()
    )
    for name, expected in one.items():
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(many[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(many[name], expected, err_msg=name)


def test_the_experts_are_those_that_the_model_used(passages: Passages) -> None:
    """The ids that the experts of the model were called with, whatever their order."""
    model = models.make_model("deepseek_v3")
    used = np.zeros(models.EXPERTS, dtype=np.int64)
    experts = model.model.layers[1].mlp.experts
    calls: list[torch.Tensor] = []
    experts.register_forward_pre_hook(lambda module, inputs: calls.append(inputs[1].clone()))
    tokens = Tokens(models.make_tokenizer(adds_bos=False), LENGTH)
    arrays = Recorder(model, FAMILIES["deepseek_v3"], passages, tokens, 5, CPU).run().arrays()
    for ids, batch in zip(calls, tokens.batches(passages, 5, CPU), strict=True):
        used += np.bincount(ids[batch.counted_BL.reshape(-1)].reshape(-1).numpy(), minlength=models.EXPERTS)
    assert arrays["counts_top_k_YDE"].sum((0, 1)).tolist() == used.tolist()


def test_router_vectors_are_the_rows_of_its_weight(passages: Passages) -> None:
    model = models.make_model("olmoe")
    cosine_YEE = record(model, passages, "olmoe")["router_cosine_YEE"]
    for y, layer in enumerate(model.model.layers):
        rows = layer.mlp.gate.weight.detach().double().numpy()
        expected = [[float(a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)) for b in rows] for a in rows]
        np.testing.assert_allclose(cosine_YEE[y], expected, atol=1e-6)


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_use() -> None:
    model = models.make_model("qwen2_moe")
    routers = find_routers(model, FAMILIES["qwen2_moe"])
    expert = 3 * models.WIDTH * 16
    total = sum(parameter.numel() for parameter in model.parameters())
    assert active_parameters(model, routers, 2) == total - 2 * (models.EXPERTS - 2) * expert


def test_a_model_of_dense_blocks_has_no_router() -> None:
    model = models.make_model("qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(CheckpointError, match="Qwen3MoeForCausalLM has no router"):
        find_routers(model, FAMILIES["qwen3_moe"])


def test_a_router_that_returns_something_else_is_refused() -> None:
    logits = torch.zeros(3, 8)
    for output in (logits, (logits, torch.zeros(3, 2)), (logits, torch.zeros(3, 2), torch.zeros(3, 2))):
        with pytest.raises(CheckpointError, match=r"transformers \d.* is not one that this was made for"):
            read_output(output, FAMILIES["olmoe"], 3)


def test_a_domain_that_the_tokenizer_does_not_know_is_named() -> None:
    alphabets = {"latin": models.ALPHABETS["latin"], "thai": "กขฃคฅฆง"}
    passages = cut_passages(models.make_documents(2, 20, alphabets), LENGTH, per_domain=2)
    with pytest.raises(CheckpointError, match=r"no countable token of the domain 'thai'.*--tokenizer"):
        record(models.make_model("mixtral"), passages, "mixtral")


def test_a_router_that_does_not_choose_is_refused(passages: Passages) -> None:
    model = models.make_model("deepseek_v2")
    model.model.layers[1].mlp.gate = torch.nn.Linear(models.WIDTH, models.EXPERTS)
    with pytest.raises(CheckpointError, match=r"Linear does not choose experts: transformers \d.* made for"):
        record(model, passages, "deepseek_v2")


def test_a_router_that_is_gone_around_is_noticed(passages: Passages) -> None:
    model = models.make_model("gpt_oss")
    model.model.layers[1].mlp.forward = lambda hidden: (hidden, None)
    with pytest.raises(CheckpointError, match=r"not every router was called once.* the MoE layers \[0\] were"):
        record(model, passages, "gpt_oss")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_a_saved_model_is_recorded_alike(name: str, passages: Passages, tmp_path: Path) -> None:
    model = models.make_model(name)
    expected = record(model, passages, name)
    loaded = load_hub_model(str(models.save(model, tmp_path)), None, "auto", CPU)
    arrays = record(loaded.model, passages, name, loaded.tokenizer)
    assert arrays["counts_top_k_YDE"].tolist() == expected["counts_top_k_YDE"].tolist()
    assert arrays["sequence_loss_N"].tolist() == expected["sequence_loss_N"].tolist()
