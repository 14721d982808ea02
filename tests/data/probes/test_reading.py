"""Probing tasks of files that are written here: what is read, what is left out, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.data.probes.reading import TaskData, read_task
from moe_testbed.data.probes.trained_text import TrainedText

LABELS = ["good", "bad", "odd"]


def sentence(seed: int) -> str:
    """Six hundred letters."""
    generator = random.Random(seed)
    return " ".join("".join(generator.choices("abcdefghijklmnop", k=5)) for _ in range(120))


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Thirty lines in each of two files, with labels in turn."""
    for name, first in (("one.tsv", 0), ("two.tsv", 30)):
        written = [f"{LABELS[number % 3]}\t{sentence(number)}" for number in range(first, first + 30)]
        (tmp_path / name).write_text("\n".join(written) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def task(lines: Path) -> Callable[..., TaskConfig]:
    def make(**settings: Any) -> TaskConfig:
        sources = [{"kind": "files", "glob": f"{lines}/*.tsv"}]
        common = {"name": "lines", "kind": "sequence", "metric": "accuracy", "reader": "labelled_lines"}
        return TaskConfig.model_validate({**common, "sources": sources, "split": "random", **settings})

    return make


def read(task: TaskConfig, trained_on: list[str] | None = None, log: list[str] | None = None) -> TaskData:
    messages: list[str] = [] if log is None else log
    return read_task(task, TrainedText.of_texts(trained_on or []), Path("unused"), messages.append)


def test_documents_have_names_and_stand_in_one_part(task: Callable[..., TaskConfig], lines: Path):
    data = read(task())
    assert data.classes == ("bad", "good", "odd")
    assert (len(data.train), len(data.test)) == (45, 15)
    found = {**data.train, **data.test}
    assert set(found) == {f"{lines}/{name}.tsv:{line}" for name in ("one", "two") for line in range(1, 31)}
    (example,) = found[f"{lines}/two.tsv:5"]
    assert (example.text, example.labels) == (sentence(34), (LABELS[34 % 3],))
    assert example.document == f"{lines}/two.tsv:5"


def test_classes_gather_labels(task: Callable[..., TaskConfig]):
    data = read(task(classes={"fine": ["good", "odd"], "not": ["bad"], "rare": ["strange"]}))
    assert data.classes == ("fine", "not"), "in the order of the file, without those that do not occur"
    labels = [example.labels[0] for part in (data.train, data.test) for found in part.values() for example in found]
    assert (labels.count("fine"), labels.count("not")) == (40, 20)


def test_a_label_that_no_class_has_is_refused_or_dropped(task: Callable[..., TaskConfig], lines: Path):
    classes = {"fine": ["good"], "not": ["bad"]}
    with pytest.raises(DataError, match=rf"probing task 'lines': {lines}/one.tsv has the label 'odd', which none of"):
        read(task(classes=classes))
    data = read(task(classes=classes, unlisted="drop"))
    assert len(data.train) + len(data.test) == 40
    with pytest.raises(DataError, match="probing task 'lines': it has no labelled text: correct its sources or its cl"):
        read(task(classes={"fine": ["strange"]}, unlisted="drop"))


def test_words_of_a_dropped_label_are_dropped(task: Callable[..., TaskConfig], tmp_path: Path):
    for number in range(4):
        rows = [f"{at}\t{word}\t_\t{tag}" + "\t_" * 6 for at, word, tag in ((1, "a", "DET"), (2, "cat", "NOUN"))]
        (tmp_path / f"{number}.tsv.conllu").write_text("\n".join(rows), encoding="utf-8")
    sources = [{"kind": "files", "glob": f"{tmp_path}/*.conllu"}]
    options = {"classes": {"noun": ["NOUN"]}, "unlisted": "drop", "reader": "conllu", "kind": "token"}
    data = read(task(sources=sources, **options))
    examples = [example for part in (data.train, data.test) for found in part.values() for example in found]
    assert [(example.text, example.labels, example.words) for example in examples] == [
        ("a cat", ("noun",), ((2, 5),))
    ] * 4


def test_records_that_cannot_be_read_are_left_out_up_to_a_share(task: Callable[..., TaskConfig], tmp_path: Path):
    (tmp_path / "three.tsv").write_text("no tab here\n", encoding="utf-8")
    log: list[str] = []
    data = read(task(max_bad_records=0.5), log=log)
    assert len(data.train) + len(data.test) == 60
    (message,) = log
    assert message.startswith("lines: 1 of 4 records cannot be read and are left out:")
    assert "three.tsv: line 1 is not a label, a tab and a text" in message
    with pytest.raises(DataError, match=r"probing task 'lines': 1 of 4 records cannot be read.*raise max_bad_records"):
        read(task())


def test_a_test_on_what_was_trained_on_is_refused_with_one_message(task: Callable[..., TaskConfig]):
    tested = [example.text for examples in read(task()).test.values() for example in examples]
    trained_on = [f"{sentence(1_000)} {text.upper()}, {sentence(1_001)}" for text in tested[:2]]
    with pytest.raises(DataError) as refused:
        read(task(), trained_on)
    message = str(refused.value)
    assert "\n" not in message
    assert message.startswith(
        "probing task 'lines': it would test on text that the run was trained on: of 2 of its 15 t"
    )
    assert message.endswith("take that text out of the mix, or split the task by `held_out`")


def test_training_on_what_was_trained_on_is_allowed(task: Callable[..., TaskConfig]):
    data = read(task())
    learned_from = [example.text for examples in data.train.values() for example in examples]
    assert read(task(), learned_from).test.keys() == data.test.keys()


def test_a_part_of_a_text_may_have_been_trained_on(task: Callable[..., TaskConfig]):
    tested = [example.text for examples in read(task()).test.values() for example in examples]
    read(task(), [text[:40] for text in tested])


def test_held_out_documents_are_found(task: Callable[..., TaskConfig], lines: Path):
    held_out = set(range(0, 60, 7))
    trained_on = [sentence(number) for number in range(60) if number not in held_out]
    data = read(task(split={"kind": "held_out", "test": 0.5}), trained_on)
    assert {example.text for found in data.test.values() for example in found} == set(map(sentence, held_out))
    assert len(data.train) == 60 - len(held_out)
    with pytest.raises(DataError, match="probing task 'lines': all 60 documents were trained on"):
        read(task(split="held_out"), list(map(sentence, range(60))))


def test_short_texts_are_told_of(task: Callable[..., TaskConfig], tmp_path: Path):
    (tmp_path / "short.tsv").write_text("\n".join(f"good\tword {n}" for n in range(60)), encoding="utf-8")
    log: list[str] = []
    read(task(), log=log)
    (message,) = log
    assert message.startswith("lines: ") and message.endswith(
        "of 30 test documents are too short to tell whether the run was trained on them"
    )


def test_several_documents_of_a_file_have_names_of_their_own(task: Callable[..., TaskConfig], tmp_path: Path):
    tune = "X:{}\nM:{}\nK:D\nABc d2|"
    (tmp_path / "book.abc").write_text("\n".join(tune.format(n, "6/8" if n % 2 else "2/4") for n in range(8)))
    sources = [{"kind": "files", "glob": f"{tmp_path}/book.abc", "reader": "abc_tunes"}]
    data = read(task(sources=sources, reader="tune_metre"))
    names = {f"{tmp_path}/book.abc", *(f"{tmp_path}/book.abc#{number}" for number in range(2, 9))}
    assert {*data.train, *data.test} == names


def test_missing_files_are_told(task: Callable[..., TaskConfig], tmp_path: Path):
    with pytest.raises(DataError, match="probing task 'lines': no file matches"):
        read(task(sources=[{"kind": "files", "glob": f"{tmp_path}/*.none"}]))
