"""What a probing task has found of a run: the record of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

_MOST = 1e6
"""No score is as large."""


@dataclass(frozen=True)
class Score:
    """A score with the bounds of its interval over documents, at nominally 95 %.

    Attributes:
        value: the mean over the seeds.
        by_seed: that of each seed.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...] = ()

    @classmethod
    def of(cls, content: Any) -> Score | None:
        """Returns the score in a JSON value; None if it is none."""
        if not isinstance(content, dict) or not isinstance(by_seed := content.get("by_seed"), list):
            return None
        numbers: list[Any] = [content.get(key) for key in ("value", "low", "high")] + by_seed
        if not all(isinstance(number, int | float) and abs(number) <= _MOST for number in numbers):
            return None
        value, low, high, *seeds = map(float, numbers)
        return cls(value, low, high, tuple(seeds))


@dataclass(frozen=True)
class ProbedRow:
    """The scores of an encoder, or of what does without one.

    Attributes:
        name: what it is.
        floor: it knows nothing of the pre-training.
        linear: with a linear layer on states that stay as they are; None where there are no states.
        fine_tuned: with everything trained; None where nothing can be.
        linear_lead: by how much the linear score is above that of a random table on the same documents; None of floors.
        fine_tuned_lead: by how much the fine-tuned score is above that of a random model, likewise.
    """

    name: str
    floor: bool
    linear: Score | None = None
    fine_tuned: Score | None = None
    linear_lead: Score | None = None
    fine_tuned_lead: Score | None = None

    @classmethod
    def of(cls, content: Any) -> ProbedRow | None:
        """Returns the row in a JSON value; None if it is none."""
        if not isinstance(content, dict) or not isinstance(name := content.get("name"), str):
            return None
        scores = ("linear", "fine_tuned", "linear_lead", "fine_tuned_lead")
        return cls(name, content.get("floor") is not False, *(Score.of(content.get(key)) for key in scores))


@dataclass(frozen=True)
class ProbingRecord:
    """What a probing task has found of a run.

    Attributes:
        task, kind, metric: of the task.
        step, digest: optimizer steps of the checkpoint that was probed, and the digest of its weights.
        classes: what the labels may be.
        train_documents, train_labels, test_documents, test_labels: what was learned from and tested on.
        rates: name of each row that was fine-tuned -> the learning rate that was best on a part of the training
            documents.
        rows: the run, then the floors.
        examples: of a generation task, some test texts: what was given, wanted and written.
    """

    task: str
    kind: str
    metric: str
    step: int
    digest: str
    classes: tuple[str, ...]
    train_documents: int
    train_labels: int
    test_documents: int
    test_labels: int
    rates: Mapping[str, float]
    rows: tuple[ProbedRow, ...]
    examples: tuple[tuple[str, str, str], ...] = ()

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ProbingRecord | None:
        """Returns the record in the content of its file; None if it is none."""
        texts = [content.get(key) for key in ("task", "kind", "metric", "digest")]
        counts = [content.get(part.name) for part in fields(cls) if part.type == "int"]
        lists = [content.get(key) for key in ("classes", "rows", "examples")]
        if not (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(count, int) for count in counts)
            and all(isinstance(entries, list) for entries in lists)
            and isinstance(content.get("rates"), dict)
        ):
            return None
        rows = [ProbedRow.of(row) for row in content["rows"]]
        known = {part.name: content[part.name] for part in fields(cls)}
        known |= {
            "classes": tuple(map(str, content["classes"])),
            "rows": tuple(row for row in rows if row is not None),
            "examples": tuple(
                (str(example[0]), str(example[1]), str(example[2]))
                for example in content["examples"]
                if isinstance(example, list) and len(example) == 3
            ),
        }
        return cls(**known)

    def content(self) -> dict[str, Any]:
        """Returns what is written into the file."""
        return asdict(self)
