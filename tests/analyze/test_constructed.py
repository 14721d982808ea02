"""Models whose routers are built so that the right answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moe_testbed.data.documents import Document
from moe_testbed.launcher.analyze.families import FAMILIES
from moe_testbed.launcher.analyze.passages import Tokens, cut_passages
from moe_testbed.launcher.analyze.recorder import Recorder
from moe_testbed.routing import metrics
from tests.analyze import models

CPU = torch.device("cpu")
LENGTH = 16
DOMAINS, LETTERS = len(models.ALPHABETS), 8


def embeddings(unit_of: Any) -> torch.Tensor:
    """Every character a unit vector, the one that ``unit_of(domain, letter)`` names; special tokens the last one."""
    embedding_VM = torch.zeros(models.VOCAB_SIZE, models.WIDTH)
    embedding_VM[: len(models.SPECIAL), -1] = 1.0
    for number in range(len(models.CHARACTERS)):
        embedding_VM[len(models.SPECIAL) + number, unit_of(*divmod(number, LETTERS))] = 1.0
    return embedding_VM


def counts(embedding_VM: torch.Tensor, router_EM: torch.Tensor, top_k: int, **text: Any) -> dict[str, Any]:
    model = models.make_routed_model(embedding_VM, router_EM, top_k)
    passages = cut_passages(text.get("documents") or models.make_documents(6, 60), LENGTH, per_domain=8)
    return (
        Recorder(model, FAMILIES["mixtral"], passages, Tokens(models.make_tokenizer(), LENGTH), 8, CPU).run().arrays()
    )


def test_each_domain_to_its_own_experts() -> None:
    router_EM = torch.zeros(models.EXPERTS, models.WIDTH)
    for expert in range(models.EXPERTS):
        router_EM[expert, expert // 2] = 5.0
    arrays = counts(embeddings(lambda domain, letter: domain), router_EM, top_k=2)
    for counts_DE, tokens_D in zip(arrays["counts_top_k_YDE"], [arrays["tokens_D"]] * 2, strict=True):
        assert metrics.domain_information(counts_DE) == pytest.approx(1.0)
        assert metrics.purity(counts_DE) == pytest.approx(1.0)
        assert metrics.owners(counts_DE)[0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        expected = np.zeros((DOMAINS, models.EXPERTS), dtype=np.int64)
        for domain, tokens in enumerate(tokens_D):
            expected[domain, [2 * domain, 2 * domain + 1]] = tokens
        assert counts_DE.tolist() == expected.tolist()
    # Experts of a pair are always used together, and those of different domains never.
    together_EE = arrays["coactivation_YEE"][0]
    assert np.count_nonzero(together_EE) == 2 * models.EXPERTS
    assert all(together_EE[2 * d, 2 * d + 1] == tokens for d, tokens in enumerate(arrays["tokens_D"]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_to_the_same_experts(top_k: int) -> None:
    router_EM = torch.zeros(models.EXPERTS, models.WIDTH)
    router_EM[0], router_EM[1] = 5.0, 4.0
    arrays = counts(embeddings(lambda domain, letter: 8 * domain // DOMAINS + letter), router_EM, top_k)
    for counts_DE in arrays["counts_top_k_YDE"]:
        assert metrics.effective_experts(counts_DE) == pytest.approx(top_k)
        assert metrics.domain_information(counts_DE) == pytest.approx(0.0, abs=1e-12)
        assert metrics.dead_experts(counts_DE) == pytest.approx(1 - top_k / models.EXPERTS)


def test_routing_by_letter_knows_nothing_of_the_domain() -> None:
    """Every letter of an alphabet to another expert, and as many of each letter in all domains."""
    router_EM = 5.0 * torch.eye(models.EXPERTS, models.WIDTH)
    documents = {
        name: [Document(alphabet * 8 + alphabet[0], f"{name}{number}") for number in range(8)]
        for name, alphabet in models.ALPHABETS.items()
    }
    arrays = counts(embeddings(lambda domain, letter: letter), router_EM, top_k=1, documents=documents)
    letters = arrays["counts_top_k_YDE"]
    assert arrays["tokens_D"].tolist() == [8 * (LENGTH - 1)] * DOMAINS
    for counts_DE in letters:
        assert (counts_DE == counts_DE[0]).all()
        assert metrics.domain_information(counts_DE) == pytest.approx(0.0, abs=1e-12)
        assert metrics.normalised_effective_experts(counts_DE) > 0.99
    # What an expert is chosen for is the letter.
    ids, counts_VE = arrays["vocabulary_ids_V"], arrays["vocabulary_counts_YVE"][0]
    for number, row in zip(ids, counts_VE, strict=True):
        assert np.flatnonzero(row).tolist() == [(number - len(models.SPECIAL)) % LETTERS]
    assert metrics.token_information(counts_VE) == pytest.approx(1.0)
