"""Linear layers, fine-tuning, and what is found without a model."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from moe_testbed.data.probes.base import Example
from moe_testbed.data.probes.config import Learning
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.probing.fine_tuning import best_rate, fine_tune
from moe_testbed.launcher.probing.floors import majority, word_by_word, word_features
from moe_testbed.launcher.probing.linear import linear_layer
from moe_testbed.launcher.probing.passages import Passage

NONE = np.zeros(0, dtype=np.int64)


def words(*labelled: tuple[str, int]) -> Passage:
    """A passage of words with their classes."""
    written = ["", *(word for word, _ in labelled), ""]
    around = tuple(zip(written, written[1:], written[2:], strict=False))
    return Passage("d", NONE, np.array([label for _, label in labelled]), NONE, around)


def test_a_linear_layer_is_at_the_optimum_of_its_penalised_likelihood() -> None:
    """Its gradient is zero there: recomputed from the classes' probabilities on standardised states."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    states, noise = rng.normal(3.0, 5.0, (300, 4)), rng.normal(0.0, 4.0, (300, 3))
    classes = (states @ rng.normal(size=(4, 3)) + noise).argmax(axis=1)
    standard = (states - states.mean(axis=0)) / states.std(axis=0)
    layer = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(standard, classes)
    residual = layer.predict_proba(standard) - np.eye(3)[classes]
    np.testing.assert_allclose(residual.T @ standard + layer.coef_, 0, atol=1e-3)
    np.testing.assert_array_equal(linear_layer(states, classes, states), layer.predict(standard))


def test_one_class_is_found_everywhere() -> None:
    assert linear_layer(np.ones((3, 2)), np.array([2, 2, 2]), np.zeros((4, 2))).tolist() == [2, 2, 2, 2]


def test_the_most_frequent_class_of_the_training_text() -> None:
    train, test = [words(("a", 1), ("b", 1), ("c", 0))], [words(("d", 0), ("e", 2))]
    assert majority(train, test).tolist() == [1, 1]


def test_words_tell_by_their_end_by_what_stands_beside_them_and_by_how_they_are_written() -> None:
    stems = [f"{first}{second}{third}" for first in "bdgk" for second in "aeiou" for third in "lmnr"]
    train, test = stems[::2], stems[1::2]
    ends = [[words(*((stem + "ing", 0), (stem + "ed", 1))) for stem in part] for part in (train, test)]
    assert word_features(*ends, "token").tolist() == [0, 1] * len(test)
    # The word itself is new, and what stands before it decides.
    beside = [[words(("the", 2), (stem, 0), ("will", 3), (stem, 1)) for stem in part] for part in (train, test)]
    assert word_features(*beside, "token").tolist() == [2, 0, 3, 1] * len(test)
    written = [[words((stem, 0), (stem.title(), 1), (stem.upper(), 2)) for stem in part] for part in (train, test)]
    assert word_features(*written, "token").tolist() == [0, 1, 2] * len(test)


def test_texts_tell_by_their_words_in_any_order() -> None:
    def text(label: int, *written: str) -> Passage:
        return Passage("d", NONE, np.array([label]), NONE, tuple(("", word, "") for word in written))

    train = [text(0, "goal", "match", "the"), text(1, "vote", "law", "the"), text(0, "the", "match"), text(1, "vote")]
    test = [text(0, "a", "the", "goal"), text(1, "law", "a", "the", "vote")]
    assert word_features(train, test, "sequence").tolist() == [0, 1]


def test_words_are_replaced_by_what_most_often_stood_for_them() -> None:
    train = [
        Example("ktb fy", ("kitab fi",)),
        Example("ktb", ("kataba",)),
        Example("ktb", ("kitab",)),
        # As many words on both sides are needed to know which stands for which.
        Example("fy byt", ("one two three",)),
    ]
    assert word_by_word(train, ["ktb fy byt", "byt"]) == ["kitab fi byt", "byt"]


def test_fine_tuning_is_adamw_under_a_triangle_of_rates() -> None:
    """The same loop with torch's own scheduler, on the batches of the same order."""
    inputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(2))
    learning = Learning(epochs=3, batch_size=4)

    def start() -> nn.Linear:
        layer = nn.Linear(3, 1)
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.bias.fill_(0.1)
        return layer

    seen: list[list[int]] = []
    layer = start()

    def loss_of(rows: list[int]) -> torch.Tensor:
        seen.append(rows)
        return 40 * (layer(inputs[rows]) - 1).square().mean()

    assert fine_tune(layer.parameters(), loss_of, range(10), learning, 0.05, seed=7)
    assert [len(rows) for rows in seen] == [4, 4, 2] * 3
    epochs = [[row for rows in seen[begin : begin + 3] for row in rows] for begin in (0, 3, 6)]
    assert [sorted(rows) for rows in epochs] == [list(range(10))] * 3
    assert len({tuple(rows) for rows in epochs}) == 3

    other = start()
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.05, weight_decay=0.01)
    # 9 steps, of which the first is the warm-up.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else (9 - step) / 8)
    for rows in seen:
        optimizer.zero_grad()
        (40 * (other(inputs[rows]) - 1).square().mean()).backward()
        nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(layer.weight, other.weight)
    torch.testing.assert_close(layer.bias, other.bias)


def test_a_training_ends_at_the_first_loss_that_is_not_finite() -> None:
    weight = nn.Parameter(torch.ones(1))
    losses = iter([1.0, math.inf])
    assert not fine_tune([weight], lambda _: weight.sum() * next(losses), range(9), Learning(batch_size=1), 0.1, 0)
    assert weight.isfinite().all()


def test_the_best_rate_is_taken_and_one_that_diverges_is_not() -> None:
    learning = Learning(rates=(0.1, 0.2, 0.3, 0.4))
    found = {0.1: 1.0, 0.2: 3.0, 0.3: math.nan, 0.4: 3.0}
    assert best_rate("it", learning, found.__getitem__) == 0.2
    with pytest.raises(CheckpointError, match=r"fine-tuning it diverges at the learning rate 0.1, 0.2, 0.3, 0.4"):
        best_rate("it", learning, lambda _: math.nan)
    # A single rate is not tried beforehand.
    assert best_rate("it", Learning(rates=(0.5,)), lambda _: pytest.fail("tried")) == 0.5
