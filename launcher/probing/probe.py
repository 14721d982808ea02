"""Probes runs: what linear layers and fine-tuning find by their encoders, beside what both find without pre-training.

Shape legend: M model width, V token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from moe_testbed.data.probes.alignment import PieceFinder
from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.data.probes.reading import TaskData, read_task
from moe_testbed.data.probes.trained_text import TrainedText
from moe_testbed.launcher.checkpoint.own_run import OwnRun, load_model, open_run
from moe_testbed.launcher.checkpoint.weights import digest
from moe_testbed.launcher.config.model_size import language_model, setting_on, special_ids
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.probing.classification import Classification, Encode
from moe_testbed.launcher.probing.generation import Generation, pairs_of
from moe_testbed.launcher.probing.passages import Readings, passages_of
from moe_testbed.launcher.probing.scores import MEASURES, Float64, lead, score
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.probing import ProbedRow, ProbingRecord
from moe_testbed.model.config import DECODER, ENCODER
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import UNLABELLED, RoutingContext

Log = Callable[[str], None]
Found = TypeVar("Found")

RANDOM_TABLE, RANDOM_MODEL, MAJORITY, WORDS = "random table", "random model", "majority", "words alone"
COPIED, WORD_BY_WORD = "copied", "word by word"
TABLE = "its table alone"
_EXAMPLES = 3


@dataclass(frozen=True)
class Counts:
    """What the task's measure sums of a row, for each seed and document; None where there is no such score."""

    linear: Float64 | None = None
    fine_tuned: Float64 | None = None
    rate: float | None = None


class Prober:
    """Probes one run after another with one task. What does not depend on the run's weights is found once.

    Args:
        cache_dir: downloads and token stores; None: where the training had them.
        trust: routers that the configs of other users' runs name may be imported.
    """

    def __init__(
        self, task: TaskConfig, cache_dir: Path | None, device: torch.device, log: Log, trust: bool = False
    ) -> None:
        self._task, self._cache_dir, self._device, self._log, self._trust = task, cache_dir, device, log, trust
        self._found: dict[tuple[str, ...], object] = {}

    def __call__(self, folder: Path) -> ProbingRecord:
        """Probes a run and writes what was found into its folder.

        Raises:
            CheckpointError: no whole checkpoint, data that have changed since the training, or a fine-tuning that
                diverges.
            ConfigError: the task does not go together with the run.
            DataError: the labelled texts cannot be had, or the run was trained on those of the test.
        """
        run = open_run(folder, self._cache_dir, self._log, self._trust)
        self._refuse(run)
        model = load_model(run).to(self._device)
        data = self._once(("data", str(run.store.path)), lambda: self._read(run))
        make = self._generated if self._task.kind == "generation" else self._classified
        record = make(run, model, data)
        RunFolder(folder).write_probing(record)
        return record

    def _refuse(self, run: OwnRun) -> None:
        """Raises ConfigError if the task does not go together with the run."""
        task, architecture = self._task, run.config.model.architecture
        if task.kind == "generation" and architecture != "encoder_decoder":
            raise ConfigError(
                f"the probing task '{task.name}' asks for texts to be written, and {run.folder} has the architecture "
                f"{architecture}; give a run with encoder_decoder, or a task of the kind token or sequence"
            )
        if not run.config.routing.needs_domains or run.config.model.num_moe_layers == 0:
            return
        if task.domain not in run.store.domains:
            said = "names no domain" if task.domain is None else f"is of the domain '{task.domain}'"
            raise ConfigError(
                f"the router of {run.folder} reads the domain of every token, and the probing task '{task.name}' "
                f"{said}; the run's domains are {', '.join(run.store.domains)}: set the task's `domain` to one of "
                "them, or give a run with another router"
            )
        if task.kind == "generation":
            raise ConfigError(
                f"the router of {run.folder} reads the domain of every token, which is not known of a text that is yet "
                "to be written; give a run with another router, or a task of the kind token or sequence"
            )

    def _read(self, run: OwnRun) -> TaskData:
        cache_dir = Path(run.config.data.cache_dir)
        trained = TrainedText.of(run.store, cache_dir)
        return read_task(self._task, trained, cache_dir, self._log)

    def _once(self, key: tuple[str, ...], find: Callable[[], Found]) -> Found:
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]  # type: ignore[return-value]

    def _readings(self, run: OwnRun) -> Readings:
        domains = run.store.domains
        number = domains.index(self._task.domain) if self._task.domain in domains else UNLABELLED
        return Readings(number, self._device)

    def _shape(self, run: OwnRun) -> tuple[str, ...]:
        """What floors depend on."""
        config = run.config
        parts = config.model, config.routing, config.objective, config.data.sequence_length
        return str(run.store.path), *map(str, parts)

    def _random_models(self, run: OwnRun) -> list[LanguageModel]:
        """Models of the run's sizes at their start, one for each seed."""
        pieces, setting = run.store.vocab_size, setting_on(run.config, run.store)
        configs = [run.config.model_copy(update={"seed": seed}) for seed in self._task.learning.seeds]
        return [language_model(config, pieces, setting).eval().to(self._device) for config in configs]

    def _classified(self, run: OwnRun, model: LanguageModel, data: TaskData) -> ProbingRecord:
        task, finder = self._task, PieceFinder(run.store.tokenizer_path)
        length = next(iter(model.stacks.values())).positions.length
        train, test = (
            passages_of(part, data.classes, task.kind, finder, length, limit)
            for part, limit in ((data.train, task.limits.train), (data.test, task.limits.test))
        )
        if not train or not test:
            raise ConfigError(
                f"of the probing task '{task.name}' no label is left to {'learn from' if test else 'test on'} with the "
                f"tokenizer of {run.folder}: raise its limits, or take another task"
            )
        classification = Classification(task, len(data.classes), train, test, self._readings(run))
        seeds = len(task.learning.seeds)
        self._log(f"{run.folder}: linear layers and fine-tuning")
        fine_tuned, rate = classification.fine_tuned(str(run.folder), [model] * seeds)
        rows = {
            run.folder.name: Counts(classification.linear([model.encode]), fine_tuned, rate),
            TABLE: Counts(classification.linear([_table(model.embedding.weight)])),
        }
        floors = self._once(("floors", *self._shape(run)), lambda: self._classified_floors(run, classification))
        labels = [sum(len(passage.labels) for passage in part) for part in (train, test)]
        documents = [len({passage.document for passage in part}) for part in (train, test)]
        return self._record(run, data.classes, documents, labels, rows, floors)

    def _classified_floors(self, run: OwnRun, classification: Classification) -> dict[str, Counts]:
        self._log("what is found without pre-training")
        models = self._random_models(run)
        fine_tuned, rate = classification.fine_tuned(RANDOM_MODEL, models)
        tables = [_random_table(model.embedding.weight, seed) for model, seed in self._seeded(models)]
        return {
            RANDOM_MODEL: Counts(classification.linear([model.encode for model in models]), fine_tuned, rate),
            RANDOM_TABLE: Counts(classification.linear([_table(table) for table in tables])),
            WORDS: Counts(classification.word_features()),
            MAJORITY: Counts(classification.majority()),
        }

    def _seeded(self, models: Sequence[LanguageModel]) -> list[tuple[LanguageModel, int]]:
        return list(zip(models, self._task.learning.seeds, strict=True))

    def _generated(self, run: OwnRun, model: LanguageModel, data: TaskData) -> ProbingRecord:
        task, finder = self._task, PieceFinder(run.store.tokenizer_path)
        longest = [model.stacks[name].positions.length for name in (ENCODER, DECODER)]
        parts = ((data.train, task.limits.train), (data.test, task.limits.test))
        (train, _), (test, too_long) = (pairs_of(part, finder, longest[0], longest[1], limit) for part, limit in parts)
        if too_long:
            self._log(f"{task.name}: {too_long:,} texts of the test are too long for {run.folder} and left out")
        if not train or not test:
            raise ConfigError(
                f"of the probing task '{task.name}' no text of the {'test' if train else 'training'} fits "
                f"{run.folder}, which reads {longest[0]} tokens and writes {longest[1]}; take a model with a greater "
                "length"
            )
        ids = special_ids(run.config, run.store.vocab_size)
        generation = Generation(task, train, test, self._readings(run), longest[1], ids, finder)
        self._log(f"{run.folder}: fine-tuning")
        written, rate = generation.fine_tuned(str(run.folder), [model] * len(task.learning.seeds))
        rows = {run.folder.name: Counts(fine_tuned=generation.counted(written), rate=rate)}
        floors = self._once(("floors", *self._shape(run)), lambda: self._generated_floors(run, generation))
        documents = [len({pair.document for pair in part}) for part in (train, test)]
        examples = [(pair.given, pair.wanted, text) for pair, text in zip(test, written[0], strict=True)][:_EXAMPLES]
        return self._record(run, (), documents, [len(train), len(test)], rows, floors, tuple(examples))

    def _generated_floors(self, run: OwnRun, generation: Generation) -> dict[str, Counts]:
        self._log("what is written without pre-training")
        written, rate = generation.fine_tuned(RANDOM_MODEL, self._random_models(run))
        return {
            RANDOM_MODEL: Counts(fine_tuned=generation.counted(written), rate=rate),
            WORD_BY_WORD: Counts(generation.word_by_word()),
            COPIED: Counts(generation.copied()),
        }

    def _record(
        self,
        run: OwnRun,
        classes: Sequence[str],
        documents: Sequence[int],
        labels: Sequence[int],
        rows: dict[str, Counts],
        floors: dict[str, Counts],
        examples: tuple[tuple[str, str, str], ...] = (),
    ) -> ProbingRecord:
        everything = rows | floors
        return ProbingRecord(
            task=self._task.name,
            kind=self._task.kind,
            metric=self._task.metric,
            step=run.step,
            digest=digest(run.checkpoint),
            classes=tuple(classes),
            train_documents=documents[0],
            train_labels=labels[0],
            test_documents=documents[1],
            test_labels=labels[1],
            rates={name: counts.rate for name, counts in everything.items() if counts.rate is not None},
            rows=tuple(self._row(name, counts, floors, name in floors) for name, counts in everything.items()),
            examples=examples,
        )

    def _row(self, name: str, counts: Counts, floors: dict[str, Counts], floor: bool) -> ProbedRow:
        measure = MEASURES[self._task.metric]
        beside = {} if floor else {"linear": floors.get(RANDOM_TABLE), "fine_tuned": floors[RANDOM_MODEL]}
        scores, leads = {}, {}
        for column, sums in (("linear", counts.linear), ("fine_tuned", counts.fine_tuned)):
            if sums is None:
                continue
            scores[column] = score(measure, sums)
            base = getattr(beside.get(column), column, None)
            if base is not None:
                leads[f"{column}_lead"] = lead(measure, sums, base)
        return ProbedRow(name, floor, **scores, **leads)


def _table(table_VM: Tensor) -> Encode:
    """An encoder that looks each piece up and sees no other."""

    def encode(context: RoutingContext) -> Tensor:
        return table_VM[context.token_ids_BL]

    return encode


def _random_table(like_VM: Tensor, seed: int) -> Tensor:
    drawn = torch.randn(like_VM.shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(like_VM.device)
