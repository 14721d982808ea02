"""What can be found without a model: the most frequent class, features of words, and copying."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from moe_testbed.data.probes.base import Example, Kind
from moe_testbed.launcher.probing.linear import linear_layer
from moe_testbed.launcher.probing.passages import Passage

Int64 = npt.NDArray[np.int64]
_HASHED = 1 << 15
_LONGEST_END = 4
_FREEDOM = 10.0
"""The columns of word features are far smaller than those of standardised states."""


def labels_of(passages: Sequence[Passage]) -> Int64:
    """Returns the number of the class of each label, in the order of the passages."""
    return np.concatenate([passage.labels for passage in passages])


def majority(train: Sequence[Passage], test: Sequence[Passage]) -> Int64:
    """Returns the most frequent class of the training text for every label of the test."""
    return np.full(len(labels_of(test)), np.bincount(labels_of(train)).argmax())


def word_features(train: Sequence[Passage], test: Sequence[Passage], kind: Kind) -> Int64:
    """Returns the classes that a linear model finds by words alone: of a token task by the word, its beginning and end,
    how it is written and the words beside it; of a sequence task by the words of a passage, whatever their order."""
    from sklearn.feature_extraction import FeatureHasher
    from sklearn.preprocessing import normalize

    hasher = FeatureHasher(_HASHED, input_type="string", alternate_sign=False)
    train_XM, test_XM = (normalize(hasher.transform(_features(passages, kind))) for passages in (train, test))
    return linear_layer(train_XM, labels_of(train), test_XM, _FREEDOM)


def _features(passages: Sequence[Passage], kind: Kind) -> Iterator[list[str]]:
    for passage in passages:
        if kind == "sequence":
            yield [word.casefold() for _, word, _ in passage.words] or [""]
        else:
            for before, word, behind in passage.words:
                yield list(_of_word(before, word, behind))


def _of_word(before: str, word: str, behind: str) -> Iterable[str]:
    small = word.casefold()
    yield f"word {small}"
    yield f"before {before.casefold()}"
    yield f"behind {behind.casefold()}"
    for length in range(1, _LONGEST_END + 1):
        yield f"begins {small[:length]}"
        yield f"ends {small[-length:]}"
    yield f"written {word.istitle()} {word.isupper()} {word.isdigit()} {word.isalpha()} {len(word) == 1}"


def word_by_word(train: Sequence[Example], given: Sequence[str]) -> list[str]:
    """Returns texts in which each word stands for itself or, if it is known, for what most often stood in its place in
    the training texts whose both sides have as many words."""
    instead: dict[str, Counter[str]] = defaultdict(Counter)
    for example in train:
        words, others = example.text.split(), example.labels[0].split()
        if len(words) == len(others):
            for word, other in zip(words, others, strict=True):
                instead[word][other] += 1
    best = {word: counts.most_common(1)[0][0] for word, counts in instead.items()}
    return [" ".join(best.get(word, word) for word in text.split()) for text in given]
