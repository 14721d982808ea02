"""Scores and their intervals: by scikit-learn, by sets of n-grams, and by resampling lists of documents."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from moe_testbed.launcher.probing.scores import (
    RESAMPLES,
    accuracy,
    chrf,
    confusion,
    exact_match,
    lead,
    macro_f1,
    ngram_counts,
    score,
    summed,
)
from moe_testbed.routing.metrics.bootstrap import draws

CLASSES = 4


def labels(seed: int, documents: int = 9, words: int = 20) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Documents, true classes and found ones, of which about two in three are right; class 3 is rare."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(CLASSES, size=documents * words, p=[0.5, 0.3, 0.19, 0.01])
    found = np.where(rng.random(truth.size) < 0.65, truth, rng.integers(0, CLASSES - 1, truth.size))
    return [f"d{number // words}" for number in range(truth.size)], truth, found


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_classes_are_those_of_scikit_learn(seed: int) -> None:
    documents, truth, found = labels(seed)
    counts = confusion(documents, sorted(set(documents)), truth, found, CLASSES).sum(axis=0)
    assert accuracy(counts) == pytest.approx(accuracy_score(truth, found))
    assert macro_f1(counts) == pytest.approx(f1_score(truth, found, average="macro", zero_division=0))


def test_a_class_that_is_never_found_counts_as_zero_and_one_that_is_nowhere_not_at_all() -> None:
    truth, found = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 0])
    counts = confusion(["d"] * 4, ["d"], truth, found, 3)[0]
    assert accuracy(counts) == 0.5
    assert macro_f1(counts) == pytest.approx((2 * 2 / 6 + 0) / 2)


# What `sacrebleu.metrics.CHRF()` of sacrebleu 2.6.0 says of these, in percent: corpus_score(written, [wanted]).
SCORED = [
    (["the cat sat on the mat"], ["the cat sat on a mat"], 72.085),
    (["кіт сидить"], ["кіт сидів на килимку"], 26.940),
    (["abc"], ["abd"], 38.889),
    (["a"], ["a"], 100.0),
    (["", "xyz"], ["abc", "xyz uvw"], 31.947),
    (["nothing like it"], ["1234 567 89"], 0.0),
]


@pytest.mark.parametrize(("written", "wanted", "percent"), SCORED)
def test_chrf_is_that_of_sacrebleu(written: list[str], wanted: list[str], percent: float) -> None:
    counts = sum(ngram_counts(ours, theirs) for ours, theirs in zip(written, wanted, strict=True))
    assert 100 * chrf(counts) == pytest.approx(percent, abs=0.0005)


def test_ngrams_are_counted_as_often_as_both_sides_have_them() -> None:
    counts = ngram_counts("aa ab", "aab aa")
    # "aaab" and "aabaa": of aaa-ab 3 a and 1 b against 4 a and 1 b.
    assert counts[0].tolist() == [4, 4, 5]
    pairs, others = Counter(["aa", "aa", "ab"]), Counter(["aa", "ab", "ba", "aa"])
    assert counts[1].tolist() == [(pairs & others).total(), 3, 4]
    assert counts[5].tolist() == [0, 0, 0]


def test_exact_matches() -> None:
    counts = summed(["a", "b", "a"], ["a", "b"], [np.array([1.0, 1.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])])
    assert counts.tolist() == [[2, 2], [0, 1]]
    assert exact_match(counts).tolist() == [1.0, 0.0]


def test_intervals_resample_whole_documents() -> None:
    """The quantiles of the score on the labels of documents drawn with replacement, put together one by one."""
    names = [f"d{number}" for number in range(9)]
    of_seeds = [labels(seed) for seed in (1, 2)]
    counts = np.stack([confusion(*of_seed[:1], names, *of_seed[1:], CLASSES) for of_seed in of_seeds])
    found = score(macro_f1, counts)
    assert found.by_seed == pytest.approx([f1_score(t, f, average="macro", zero_division=0) for _, t, f in of_seeds])
    assert found.value == pytest.approx(np.mean(found.by_seed))

    drawn_ZX = draws(np.random.default_rng(0), len(names), RESAMPLES)
    values = []
    for times_X in drawn_ZX[:200]:
        of_draw = []
        for documents, truth, classes in of_seeds:
            chosen = [
                place
                for name, times in zip(names, times_X, strict=True)
                for place in int(times) * [number for number, document in enumerate(documents) if document == name]
            ]
            of_draw.append(f1_score(truth[chosen], classes[chosen], average="macro", zero_division=0))
        values.append(np.mean(of_draw))
    few = np.array([np.mean(macro_f1(np.tensordot(times_X, counts, axes=(0, 1)))) for times_X in drawn_ZX[:200]])
    np.testing.assert_allclose(few, values)
    everything = [np.mean(macro_f1(np.tensordot(times_X, counts, axes=(0, 1)))) for times_X in drawn_ZX]
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(everything, [2.5, 97.5])))


def test_a_lead_is_paired_by_document() -> None:
    """Documents differ widely, and on each the one is right once more than the other: the lead has no spread."""
    generator = random.Random(0)
    names = [f"d{number}" for number in range(30)]
    better, worse = np.zeros((1, 30, 2, 2)), np.zeros((2, 30, 2, 2))
    for number in range(30):
        right = generator.randint(1, 90)
        better[0, number] = [[right + 1, 99 - right], [0, 0]]
        worse[:, number] = [[right, 100 - right], [0, 0]]
    found = lead(accuracy, better, worse)
    assert len(names) == 30
    assert (found.value, found.low, found.high) == pytest.approx((0.01, 0.01, 0.01))
    assert score(accuracy, better).high - score(accuracy, better).low > 0.1
