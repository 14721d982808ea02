"""`recovered` and its interval: the definition, what is resampled, and when it is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moe_testbed.routing.metrics.gap import lead, recovered

DOMAINS = np.repeat(np.arange(4), 8)


def losses(seeds: int, above: float, noise: float = 0.0, number: int = 0) -> np.ndarray:
    """Losses [S, N] that share their sequences, with noise of their own."""
    shared = np.random.default_rng(99).normal(3.0, 0.5, len(DOMAINS))
    return shared + above + noise * np.random.default_rng(number).standard_normal((seeds, len(DOMAINS)))


def test_share_of_the_lead() -> None:
    found = recovered(losses(1, 0.4), losses(1, 0.1), losses(1, 0.0), DOMAINS)
    assert found.undefined is None
    assert found.share.value == pytest.approx(0.75)
    assert found.lead.value == pytest.approx(0.4)
    assert recovered(losses(1, 0.4), losses(1, 0.4), losses(1, 0.0), DOMAINS).share.value == pytest.approx(0)
    assert recovered(losses(1, 0.4), losses(1, -0.4), losses(1, 0.0), DOMAINS).share.value == pytest.approx(2)


def test_domains_weigh_alike_whatever_their_number_of_sequences() -> None:
    domains = np.array([0] * 6 + [1] * 2)
    control = np.where(domains == 0, 1.0, 3.0)
    assert lead(control, np.zeros(8), domains).value == pytest.approx(2.0)


def test_one_seed_is_resampled_over_sequences_and_pairing_cancels_what_they_share() -> None:
    found = recovered(losses(1, 0.4), losses(1, 0.1), losses(1, 0.0), DOMAINS)
    assert found.share.over == "evaluation sequences"
    assert found.share.high - found.share.low < 1e-9
    noisy = recovered(losses(1, 0.4, 0.1, 1), losses(1, 0.1, 0.1, 2), losses(1, 0.0, 0.1, 3), DOMAINS)
    assert noisy.share.low < noisy.share.value < noisy.share.high


def test_sequences_are_resampled_within_their_domain() -> None:
    """Differences that vary between domains only are no noise."""
    control = losses(1, 0.0) + DOMAINS
    found = lead(control, losses(1, 0.0), DOMAINS)
    assert found.value == pytest.approx(1.5)
    assert found.high - found.low < 1e-9


def test_several_seeds_are_resampled_together() -> None:
    wave = np.array([[-0.3], [0.0], [0.3]])
    found = recovered(losses(3, 0.4) + wave, losses(3, 0.2) + wave, losses(3, 0.0) + wave, DOMAINS)
    assert found.share.over == "seeds"
    assert found.share.low == pytest.approx(0.5)
    assert found.share.high == pytest.approx(0.5)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    hits = 0
    for trial in range(100):
        rng = np.random.default_rng(trial)
        control, reference = (above + rng.standard_normal(64) for above in (0.5, 0.0))
        found = lead(control, reference, np.repeat(np.arange(2), 32))
        hits += found.low <= 0.5 <= found.high
    assert 86 <= hits <= 100


def clustered(
    number: int, documents: int, per_document: int, noise: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Differences of two domains whose documents differ from one another and whose sequences hardly do."""
    rng = np.random.default_rng(number)
    of_document = rng.normal(0.5, noise, 2 * documents)
    difference = np.repeat(of_document, per_document) + 0.01 * rng.standard_normal(2 * documents * per_document)
    cluster = np.repeat(np.arange(2 * documents), per_document)
    return difference, cluster // documents, cluster


def test_sequences_of_one_document_are_resampled_together() -> None:
    """An interval over sequences takes six sequences of a document for six documents, and misses the truth."""
    hits = {"documents": 0, "evaluation sequences": 0}
    for trial in range(100):
        difference, domain, cluster = clustered(trial, 16, 6, 0.3)
        for found in (lead(difference, 0 * difference, domain, cluster), lead(difference, 0 * difference, domain)):
            hits[found.over] += found.low <= 0.5 <= found.high
    assert 86 <= hits["documents"] <= 100
    assert hits["evaluation sequences"] < 70


def test_long_documents_weigh_by_their_sequences() -> None:
    """Against a loop that draws documents and takes the mean over all of their sequences."""
    rng = np.random.default_rng(0)
    cluster = np.array([0, 0, 0, 0, 0, 0, 1, 2, 2, 3])
    difference = np.array([1.0, 1.1, 0.9, 1.0, 1.2, 0.8, 3.0, 2.0, 2.2, 5.0])
    found = lead(difference, 0 * difference, np.zeros(10, dtype=int), cluster)
    drawn = [np.concatenate([difference[cluster == c] for c in rng.integers(0, 4, 4)]).mean() for _ in range(4000)]
    assert found.value == pytest.approx(difference.mean())
    assert [found.low, found.high] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.1)


def test_a_cluster_a_sequence_is_resampling_sequences() -> None:
    runs = [losses(1, above, 0.1, number) for number, above in enumerate((0.4, 0.1, 0.0))]
    over_documents = recovered(*runs, DOMAINS, np.arange(len(DOMAINS)))
    over_sequences = recovered(*runs, DOMAINS)
    assert over_documents.share.over == "documents"
    assert over_documents.share.low == pytest.approx(over_sequences.share.low)
    assert over_documents.share.high == pytest.approx(over_sequences.share.high)


def test_several_seeds_need_no_documents() -> None:
    found = lead(losses(3, 0.4, 0.1), losses(3, 0.0, 0.1, 1), DOMAINS, np.arange(len(DOMAINS)))
    assert found.over == "seeds"


def test_a_domain_with_one_document_is_resampled_over_sequences() -> None:
    clusters = np.where(DOMAINS == 2, 99, np.arange(len(DOMAINS)))
    assert lead(losses(1, 0.4, 0.1), losses(1, 0.0), DOMAINS, clusters).over == "evaluation sequences"


def test_a_domain_with_one_sequence_shows_no_noise_and_so_nothing_is_recovered() -> None:
    found = recovered([[1.0, 2.0, 2.1]], [[0.5, 1.0, 1.1]], [[0.0, 1.0, 1.1]], [0, 1, 1])
    assert found.lead.value == pytest.approx(1.0) and math.isnan(found.lead.low)
    assert "a domain has one of its evaluation sequences only" in str(found.undefined)


def test_clusters_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="one cluster a sequence"):
        lead(losses(1, 0.4), losses(1, 0.0), DOMAINS, [0, 1])


@pytest.mark.parametrize("seeds", [1, 4])
def test_undefined_within_noise(seeds: int) -> None:
    found = recovered(losses(seeds, 0.01, 0.5, 1), losses(seeds, 0.0), losses(seeds, 0.0, 0.5, 4), DOMAINS)
    assert found.lead.low < 0 < found.lead.high
    assert math.isnan(found.share.value)
    assert found.undefined is not None


def test_undefined_where_the_reference_does_not_lead() -> None:
    found = recovered(losses(1, 0.0), losses(1, 0.1), losses(1, 0.2), DOMAINS)
    assert "does not lead its control" in str(found.undefined)
    assert found.lead.value == pytest.approx(-0.2)
    same = recovered(losses(1, 0.0), losses(1, 0.1), losses(1, 0.0), DOMAINS)
    assert "does not lead its control" in str(same.undefined)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_undefined_where_a_loss_is_not_finite(broken: int) -> None:
    runs = [losses(1, 0.4), losses(1, 0.1), losses(1, 0.0)]
    runs[broken] = runs[broken] + math.nan
    found = recovered(*runs, DOMAINS)
    assert "not finite" in str(found.undefined)
    assert math.isnan(found.share.value)


def test_the_same_input_gives_the_same_interval() -> None:
    runs = [losses(1, above, 0.1, number) for number, above in enumerate((0.4, 0.1, 0.0))]
    assert recovered(*runs, DOMAINS) == recovered(*runs, DOMAINS)


def test_losses_that_are_not_paired_are_refused() -> None:
    with pytest.raises(ValueError, match="must be paired"):
        lead(losses(1, 0.0), losses(2, 0.0), DOMAINS)
    with pytest.raises(ValueError, match="must be paired"):
        lead(losses(1, 0.0), losses(1, 0.0), DOMAINS[:-1])
