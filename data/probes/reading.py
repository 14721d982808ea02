"""The labelled texts of a probing task: fetched, read, split by document, and kept apart from pre-training text."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from moe_testbed.data.documents import Document, clean_text
from moe_testbed.data.errors import DataError
from moe_testbed.data.probes.base import Example
from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.data.probes.trained_text import MOST_TRAINED_ON, TrainedText
from moe_testbed.data.readers.base import MOST_FILE_BYTES, NOT_AS_EXPECTED, reason_of
from moe_testbed.data.sources.base import Limits
from moe_testbed.data.sources.tally import Tally

Log = Callable[[str], None]
Documents = Mapping[str, Sequence[Example]]

MOST_BYTES = 1 << 34


@dataclass(frozen=True)
class TaskData:
    """The labelled texts of a task.

    train, test: document -> its labelled texts, in an order that has nothing to do with what the documents are.
    classes: what the labels may be; of a generation task none.
    """

    train: Documents
    test: Documents
    classes: tuple[str, ...]


def read_task(task: TaskConfig, trained: TrainedText, cache_dir: Path, log: Log) -> TaskData:
    """Fetches, reads and splits the labelled texts of a task.

    trained: what the run to be probed was pre-trained on.

    Raises DataError if the texts cannot be had, or if a document to be tested on was pre-trained on.
    """
    try:
        documents = read_documents(task, cache_dir, log)
        return _split(task, documents, trained, log)
    except DataError as error:
        raise DataError(f"probing task '{task.name}': {error}") from error


def read_documents(task: TaskConfig, cache_dir: Path, log: Log) -> dict[str, list[Example]]:
    """Returns document -> its labelled texts, with classes in the place of labels. Raises DataError."""
    for source in task.sources:
        source.prepare(cache_dir, log)
    class_of = {label: name for name, labels in task.classes.items() for label in labels}
    tally = Tally(task.max_bad_records)
    documents: dict[str, list[Example]] = {}
    for document in _numbered(_source_documents(task, cache_dir, tally)):
        try:
            examples = list(task.reader.examples(document))
        except NOT_AS_EXPECTED as error:
            tally.skip(f"{document.origin}: {reason_of(error)}")
            continue
        for example in examples:
            labelled = _in_classes(task, class_of, example, document.origin) if class_of else example
            if labelled.labels:
                name = f"{document.origin}:{example.document}" if example.document else document.origin
                documents.setdefault(name, []).append(replace(labelled, document=name))
    tally.check()
    for note in tally.notes():
        log(f"{task.name}: {note}")
    if not documents:
        raise DataError("it has no labelled text: correct its sources or its classes")
    return documents


def _source_documents(task: TaskConfig, cache_dir: Path, tally: Tally) -> Iterator[Document]:
    for source in task.sources:
        yield from source.documents(cache_dir, Limits(MOST_BYTES, MOST_FILE_BYTES), tally)


def _numbered(documents: Iterator[Document]) -> Iterator[Document]:
    """Yields documents with names of their own, where several come from one file, and with their line ends unified."""
    seen: dict[str, int] = {}
    for document in documents:
        seen[document.origin] = number = seen.get(document.origin, 0) + 1
        origin = document.origin if number == 1 else f"{document.origin}#{number}"
        yield replace(document, text=clean_text(document.text), origin=origin)


def _in_classes(task: TaskConfig, class_of: Mapping[str, str], example: Example, origin: str) -> Example:
    """Returns the labelled text with classes for labels, without the labels that have none."""
    found = [class_of.get(label) for label in example.labels]
    if task.unlisted == "refuse" and None in found:
        raise DataError(
            f"{origin} has the label '{example.labels[found.index(None)]}', which none of the task's `classes` has: "
            "add it to one, or set `unlisted` to drop"
        )
    kept = [number for number, name in enumerate(found) if name is not None]
    words = tuple(example.words[number] for number in kept) if task.kind == "token" else ()
    return replace(example, labels=tuple(name for name in found if name is not None), words=words)


def _split(task: TaskConfig, documents: Documents, trained: TrainedText, log: Log) -> TaskData:
    """Raises DataError if a part is empty, or if a document of the test was pre-trained on."""
    share = cache(lambda name: trained.share(_texts(documents[name])))
    parts = task.split.parts(list(documents), lambda name: share(name) <= MOST_TRAINED_ON)
    if known := [name for name in parts.test if share(name) > MOST_TRAINED_ON]:
        raise DataError(
            f"it would test on text that the run was trained on: of {len(known):,} of its {len(parts.test):,} test "
            f"documents, such as {known[0]}, more than {MOST_TRAINED_ON:.0%} stands in the training text of the run's "
            "mix; take that text out of the mix, or split the task by `held_out`"
        )
    if untold := sum(math.isnan(share(name)) for name in parts.test):
        log(
            f"{task.name}: {untold:,} of {len(parts.test):,} test documents are too short to tell whether the run was "
            "trained on them"
        )
    train, test = ({name: documents[name] for name in names} for names in parts)
    return TaskData(train, test, _classes(task, documents))


def _texts(examples: Sequence[Example]) -> Iterator[str]:
    """Yields all text that a document gives, its answers included."""
    for example in examples:
        yield from (example.text, *example.origins)


def _classes(task: TaskConfig, documents: Documents) -> tuple[str, ...]:
    if task.kind == "generation":
        return ()
    found = {label for examples in documents.values() for example in examples for label in example.labels}
    return tuple(name for name in task.classes if name in found) if task.classes else tuple(sorted(found))
