"""What is scored: measures that are functions of sums over documents, so that documents can be resampled.

What a measure sums of a text or document is an array of a shape of its own: a table of classes, or counts of n-grams.
It stands behind the axes of seeds and documents.

Shape legend: X documents, Z resamples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from moe_testbed.launcher.run.probing import Score
from moe_testbed.routing.metrics.bootstrap import draws, percentiles

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
Measure = Callable[[Float64], Float64]

RESAMPLES = 1000
_ORDERS = 6
_BETA = 2.0


def confusion(documents: Sequence[str], names: Sequence[str], truth: Int64, found: Int64, classes: int) -> Float64:
    """Counts labels by document, true class and class that was found.

    Args:
        documents: the document of each label.
        names: all documents, in the order of the first axis.
        truth, found: number of the class of each label.
    """
    number_of = {name: number for number, name in enumerate(names)}
    counts = np.zeros((len(names), classes, classes))
    np.add.at(counts, (np.array([number_of[name] for name in documents]), truth, found), 1.0)
    return counts


def accuracy(counts: Float64) -> Float64:
    """The share of labels that were found, of such counts, also of many."""
    right = np.trace(counts, axis1=-2, axis2=-1)
    result: Float64 = right / counts.sum(axis=(-2, -1))
    return result


def macro_f1(counts: Float64) -> Float64:
    """The mean over the classes of F1, 2 right / (true + found), of such counts, also of many. Classes that are neither
    true nor found anywhere do not count."""
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(axis=-1) + counts.sum(axis=-2)
    f1 = 2 * right / np.maximum(either, 1)
    result: Float64 = f1.sum(axis=-1) / (either > 0).sum(axis=-1)
    return result


def ngram_counts(written: str, wanted: str) -> Float64:
    """Counts n-grams of characters without white space for `chrf`, of 1 to 6 characters: those that both texts have,
    those of the written and those of the wanted one, int [6, 3]."""
    counts = np.zeros((_ORDERS, 3))
    texts = "".join(written.split()), "".join(wanted.split())
    for order in range(1, _ORDERS + 1):
        ours, theirs = (Counter(text[at : at + order] for at in range(len(text) - order + 1)) for text in texts)
        counts[order - 1] = (ours & theirs).total(), ours.total(), theirs.total()
    return counts


def chrf(counts: Float64) -> Float64:
    """chrF2 between 0 and 1, of such counts, also of many: F2 of the mean precision and the mean recall over the
    orders of n-grams that both sides have (Popovic, "chrF: character n-gram F-score for automatic MT evaluation",
    WMT 2015)."""
    both, written, wanted = np.moveaxis(counts, -1, 0)
    orders = np.maximum(((written > 0) & (wanted > 0)).sum(axis=-1), 1)
    precision = (both / np.maximum(written, 1)).sum(axis=-1) / orders
    recall = (both / np.maximum(wanted, 1)).sum(axis=-1) / orders
    weight = _BETA**2
    result: Float64 = (1 + weight) * precision * recall / np.maximum(weight * precision + recall, 1e-300)
    return result


def exact_match(counts: Float64) -> Float64:
    """The share of texts that are written as wanted, of counts [..., 2]: how many are, and how many there are."""
    result: Float64 = counts[..., 0] / counts[..., 1]
    return result


MEASURES: dict[str, Measure] = {
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "chrf": chrf,
    "exact_match": exact_match,
}


def summed(documents: Sequence[str], names: Sequence[str], counts: Iterable[Float64]) -> Float64:
    """Returns counts of texts summed by document.

    Args:
        documents: the document of each text.
        names: all documents, in the order of the first axis.
    """
    of_document: dict[str, Float64] = {}
    for name, count in zip(documents, counts, strict=True):
        of_document[name] = of_document.get(name, 0) + count
    return np.stack([of_document[name] for name in names])


def score(measure: Measure, counts: Float64) -> Score:
    """Returns a measure with its interval: the mean over seeds, resampled over documents.

    Args:
        counts: what the measure sums, for each seed and document; one seed where none was drawn.
    """
    by_seed = measure(counts.sum(axis=1))
    low, high = percentiles(_resampled(measure, counts))
    return Score(float(by_seed.mean()), float(low), float(high), tuple(by_seed.tolist()))


def lead(measure: Measure, counts: Float64, floor: Float64) -> Score:
    """Returns by how much a measure is above another on the same documents; the number of seeds may differ, and each
    seed stands beside the other's mean."""
    by_seed = measure(counts.sum(axis=1)) - measure(floor.sum(axis=1)).mean()
    low, high = percentiles(_resampled(measure, counts) - _resampled(measure, floor))
    return Score(float(by_seed.mean()), float(low), float(high), tuple(by_seed.tolist()))


def _resampled(measure: Measure, counts: Float64) -> Float64:
    """The mean over seeds on resampled documents, [Z]; the same documents are drawn each time."""
    drawn_ZX = draws(np.random.default_rng(0), counts.shape[1], RESAMPLES)
    means: Float64 = np.mean([measure(np.tensordot(drawn_ZX, of_seed, axes=1)) for of_seed in counts], axis=0)
    return means
