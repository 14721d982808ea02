"""The content of a probing task's file: where its labelled texts come from, how they are split, what is scored."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from moe_testbed.data.probes.base import Kind
from moe_testbed.data.probes.readers import LabelledReader, labelled_reader_kinds
from moe_testbed.data.probes.splits import Split, split_kinds
from moe_testbed.data.sources import Source, source_kinds

METRICS: dict[Kind, tuple[str, ...]] = {
    "token": ("accuracy", "macro_f1"),
    "sequence": ("accuracy", "macro_f1"),
    "generation": ("chrf", "exact_match"),
}
Metric = Literal["accuracy", "macro_f1", "chrf", "exact_match"]


class Limits(BaseModel, extra="forbid", frozen=True):
    """Says how much of a task is used, in labels: words of a token task, pieces of text that fit the model of a
    sequence task, texts to write of a generation task. Whole documents are taken until there are so many."""

    train: int = Field(default=30_000, ge=1)
    test: int = Field(default=30_000, ge=1)


class Learning(BaseModel, extra="forbid", frozen=True):
    """Says how models are fine-tuned. The rate is the one that is best on a part of the training documents."""

    epochs: int = Field(default=5, ge=1, description="how often each text is learned from")
    batch_size: int = Field(default=32, ge=1, description="texts of one update")
    rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(1e-3, 3e-3, 1e-2), min_length=1, description="learning rates, of which the best is taken"
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(1, 2, 3), min_length=1, description="seeds of new layers, of the order of texts and of random models"
    )


class TaskConfig(BaseModel, extra="forbid", frozen=True):
    """Says what a probing task is."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    kind: Kind = Field(description="token: a label a word; sequence: a label a text; generation: a text to write")
    metric: Metric = Field(description="what is scored: accuracy, macro_f1; of a generation task chrf, exact_match")
    licence: str = Field(default="unknown", description="licence of the texts and labels")
    sources: tuple[SerializeAsAny[Annotated[Source, BeforeValidator(source_kinds.parse)]], ...]
    reader: SerializeAsAny[Annotated[LabelledReader, BeforeValidator(labelled_reader_kinds.parse)]]
    split: SerializeAsAny[Annotated[Split, BeforeValidator(split_kinds.parse)]]
    classes: dict[str, tuple[str, ...]] = Field(
        default={}, description="class -> the reader's labels that it is made of; without it each label is a class"
    )
    unlisted: Literal["refuse", "drop"] = Field(
        default="refuse", description="what becomes of a label that no class has: an error, or no label at all"
    )
    domain: str | None = Field(
        default=None, description="domain of a mix that the texts are of, for runs whose router reads the domain"
    )
    max_bad_records: float = Field(
        default=0.01, ge=0, lt=1, description="share of the records (lines, rows, files) that may be unreadable"
    )
    limits: Limits = Limits()
    learning: Learning = Learning()

    @field_validator("sources")
    @classmethod
    def _at_least_one(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if not value:
            raise ValueError("a probing task needs at least one source")
        return value

    @model_validator(mode="after")
    def _check(self) -> "TaskConfig":
        if self.reader.task_kind != self.kind:
            raise ValueError(
                f"kind is '{self.kind}', but the reader '{self.reader.kind}' makes a task of the kind "
                f"'{self.reader.task_kind}': correct one of them"
            )
        if self.metric not in METRICS[self.kind]:
            raise ValueError(
                f"metric is '{self.metric}', which does not score a task of the kind '{self.kind}': take one of "
                f"{', '.join(METRICS[self.kind])}"
            )
        if self.kind == "generation" and self.classes:
            raise ValueError("classes are given, but a generation task has texts and no classes: leave them out")
        listed = [label for labels in self.classes.values() for label in labels]
        if twice := sorted({label for label in listed if listed.count(label) > 1}):
            raise ValueError(f"classes have the label '{twice[0]}' more than once: give each label to one class")
        return self
