"""Passages: which piece carries which label, after texts were cut and padded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from moe_testbed.data.probes.alignment import PieceFinder
from moe_testbed.data.probes.base import Example
from moe_testbed.launcher.probing.passages import LabelledBatch, Passage, Readings, batches, parted, passages_of

CLASSES = ("short", "long")
CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def finder(own_data: dict[str, object]) -> PieceFinder:
    """That of the tokenizer of the tiny corpus."""
    (path,) = Path(str(own_data["cache_dir"])).rglob("tokenizer.model")
    return PieceFinder(path)


def example(text: str) -> Example:
    """Its words, labelled by their length."""
    words, end = [], 0
    for word in text.split():
        start = text.index(word, end)
        end = start + len(word)
        words.append((start, end))
    labels = tuple("long" if stop - start > 3 else "short" for start, stop in words)
    return Example(text, labels, tuple(words))


TEXT = "abc abcdef gh αβγδ 012 70707 aa bbbbb hgfedcba ζη 11 22 cab"


@pytest.mark.parametrize("length", [4, 7, 16, 400])
def test_every_word_is_labelled_once_at_its_first_piece(finder: PieceFinder, length: int) -> None:
    passages = passages_of({"d": [example(TEXT)]}, CLASSES, "token", finder, length, 1000)
    found = []
    for passage in passages:
        assert len(passage.token_ids_L) <= length
        for place, label, (_, word, _) in zip(passage.places, passage.labels, passage.words, strict=True):
            piece = finder.decode([int(passage.token_ids_L[place])]).strip()
            assert piece == "" or word.startswith(piece)
            assert CLASSES[label] == ("long" if len(word) > 3 else "short")
            found.append(word)
    assert found == TEXT.split()
    neighbours = [word for passage in passages for word in passage.words]
    words = ["", *TEXT.split(), ""]
    assert neighbours == list(zip(words, words[1:], words[2:], strict=False))


def test_passages_of_a_sequence_task_are_all_of_the_text_in_order(finder: PieceFinder) -> None:
    long = Example(" ".join([TEXT] * 3), ("long",))
    passages = passages_of({"d": [long]}, CLASSES, "sequence", finder, 16, 1000)
    pieces = np.concatenate([passage.token_ids_L for passage in passages])
    whole = finder.token_ids(long.text)
    np.testing.assert_array_equal(pieces, whole[: len(pieces)])
    assert len(whole) - len(pieces) < 8
    assert {tuple(passage.labels) for passage in passages} == {(1,)}
    # A text that is short as a whole counts.
    (only,) = passages_of({"d": [Example("ab", ("short",))]}, CLASSES, "sequence", finder, 16, 1000)
    assert finder.decode(only.token_ids_L.tolist()) == "ab"


def test_whole_documents_are_taken_until_there_are_enough_labels(finder: PieceFinder) -> None:
    documents = {f"d{number}": [example(TEXT)] for number in range(5)}
    passages = passages_of(documents, CLASSES, "token", finder, 16, 14)
    assert list(dict.fromkeys(passage.document for passage in passages)) == ["d0", "d1"]


def test_the_last_documents_are_the_second_part() -> None:
    none = np.zeros(0, dtype=np.int64)
    passages = [Passage(f"d{number // 2}", none, none, none, ()) for number in range(20)]
    first, second = parted(passages, 0.2)
    assert [passage.document for passage in second] == ["d8", "d8", "d9", "d9"]
    assert first + second == passages


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_states_of_a_batch_are_those_of_each_passage_alone(finder: PieceFinder, kind: str) -> None:
    """Of passages of unequal lengths: padding stands for nothing."""
    documents = {"a": [example(TEXT)], "b": [example("ab")], "c": [example("hgfed cba 01")]}
    if kind == "sequence":
        documents = {name: [Example(of[0].text, ("short",))] for name, of in documents.items()}
    passages = passages_of(documents, CLASSES, kind, finder, 16, 1000)  # type: ignore[arg-type]
    table = torch.randn(512, 5, generator=torch.Generator().manual_seed(1))
    readings = Readings(-1, CPU)

    def states(part: list[Passage]) -> torch.Tensor:
        batch = LabelledBatch.of(part, kind, readings)  # type: ignore[arg-type]
        return batch.states(table[batch.context.token_ids_BL])

    together = torch.cat([states(part) for part in batches(passages, 3)])
    alone = []
    for passage in passages:
        rows = table[torch.from_numpy(passage.token_ids_L)]
        alone.append(rows.mean(dim=0, keepdim=True) if kind == "sequence" else rows[passage.places])
    torch.testing.assert_close(together, torch.cat(alone))
    labels = torch.cat([LabelledBatch.of(part, kind, readings).labels_X for part in batches(passages, 3)])  # type: ignore[arg-type]
    assert labels.tolist() == [label for passage in passages for label in passage.labels]
