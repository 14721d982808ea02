"""Reads the folders of runs and suites as records, leniently, so that an old or broken suite has a report."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.config.names import NAME_PATTERN
from moe_testbed.launcher.errors import visible
from moe_testbed.launcher.report.read.arrays import read_ablation, read_evaluation
from moe_testbed.launcher.run.array_file import DAMAGED
from moe_testbed.launcher.run.arrays import Ablation, Evaluation, RoutingProbe, read_probe
from moe_testbed.launcher.run.files import value_at, visible_tree
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MISSING, ONE_STACK, Manifest, MetricsLine, MoELayers, Summary
from moe_testbed.launcher.run.steps import step_of
from moe_testbed.launcher.run.suite_folder import SuiteFolder


@dataclass(frozen=True)
class Training:
    """One run of the suite under one seed. `evaluation` is there only if the training is usable.

    `notes` say in a line each what the folder has and the report leaves out. `only_layers` are the MoE layers that
    `evaluation`, `ablation` and `read_probe` are of; None: all.
    """

    label: str
    seed: int
    folder: RunFolder
    state: str
    reason: str | None
    step: int
    steps: int
    config: dict[str, Any]
    summary: Summary
    manifest: Manifest
    evaluation: Evaluation | None
    ablation: Ablation | None = None
    notes: tuple[str, ...] = ()
    only_layers: tuple[int, ...] | None = None

    @property
    def router(self) -> str:
        """Name of the router, `dense` for the dense baseline."""
        if self.setting("model", "dense_baseline"):
            return "dense"
        return str(self.setting("routing", "router", "name") or "unknown")

    @property
    def task(self) -> str:
        """The architecture and the objective with its options, in words: losses of different tasks do not compare."""
        objective = self.setting("objective")
        options = dict(objective) if isinstance(objective, dict) else {}
        words = [str(options.pop("name", "next_token")), *(f"{key} {options[key]}" for key in sorted(options))]
        return f"{self.setting('model', 'architecture') or 'causal'}, {' '.join(words)}"

    def curve(self, kind: str, key: str) -> NDArray[np.float64]:
        """Returns the (step, value) pairs [n, 2] of one of the metrics, the last one where a step was written twice."""
        pairs = {
            line.step: float(value)
            for line in self._lines
            if line.kind == kind and isinstance(value := line.values.get(key), int | float)
        }
        return np.array(sorted(pairs.items()), dtype=np.float64).reshape(-1, 2)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because their gradient was not finite."""
        counts = self.curve("train", "skipped_steps")
        return int(counts[-1, 1]) if len(counts) else 0

    @cached_property
    def _lines(self) -> list[MetricsLine]:
        return self.folder.read_metrics()

    @property
    def probe_files(self) -> list[Path]:
        """The files of the routing probes in the order of their steps, up to the step of the status."""
        return [path for path in self.folder.probe_files() if step_of(path) <= self.step]

    def read_probe(self, path: Path) -> RoutingProbe:
        """Returns one of the probes of the routing. Raises one of `DAMAGED`."""
        probe = read_probe(path)
        return probe if self.only_layers is None else probe.only_layers(self.only_layers)

    @cached_property
    def layers(self) -> MoELayers:
        """Says which stack each MoE layer is of: of one and the same where the config does not fit the counts."""
        found = MoELayers.of(self.config)
        fits = self.evaluation is not None and len(found.stacks) == len(self.evaluation.counts_top_k_YDE)
        return found if fits else ONE_STACK

    def of_layers(self, layers: Sequence[int]) -> Training:
        """Returns the training with what it says of these MoE layers alone; what is done to all layers at once, as
        forcing tokens to a domain's experts, is left out."""
        ablation = None
        with contextlib.suppress(ValueError):  # an ablation of other layers
            ablation = self.ablation and replace(self.ablation.only_layers(layers), forced_loss_DN=None)
        evaluation = self.evaluation and self.evaluation.only_layers(layers)
        return replace(self, evaluation=evaluation, ablation=ablation, only_layers=tuple(layers))

    @property
    def split(self) -> str:
        """The split that was evaluated: validation or tuning."""
        return str(self.setting("evaluation", "split") or "validation")

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a sequence that was evaluated: a training's own, or what a model of the hub was given."""
        return self.setting("evaluation", "sequence_length") or self.setting("data", "sequence_length")

    def setting(self, *keys: str) -> Any:
        """Returns the config's value under these keys, one in the other; None if it is not there."""
        return value_at(self.config, *keys)


@dataclass(frozen=True)
class Suite:
    """What a suite's config says, and a training for every run and seed, missing ones included.

    `analysis`: it is one of analysed checkpoints, of which the trainings are not known.
    """

    name: str
    folder: SuiteFolder
    descriptions: dict[str, str]
    reference: tuple[str, ...]
    control: str | None
    seeds: tuple[int, ...]
    trainings: tuple[Training, ...]
    analysis: bool = False

    @property
    def notes(self) -> list[str]:
        """What the run folders have and the report leaves out, in a line each."""
        return [f"{t.label}, seed {t.seed}: {note}" for t in self.trainings for note in t.notes]

    def of(self, label: str) -> list[Training]:
        """Returns the trainings of one run, in the order of the seeds."""
        return [training for training in self.trainings if training.label == label]

    def evaluations(self, label: str) -> dict[int, Evaluation]:
        """Returns the last evaluations of one run's finished trainings, by seed."""
        return {t.seed: t.evaluation for t in self.of(label) if t.evaluation is not None}


def read_suite(suite_dir: Path) -> Suite:
    """Reads a suite's folder; broken runs become failed trainings.

    Raises ValueError, in one line, if its config cannot be read or does not say which trainings there are.
    """
    folder = SuiteFolder(suite_dir)
    path, content = folder.config_file, folder.load_config_tree()
    if not isinstance(content, dict) or not content.get("runs"):
        raise ValueError(f"{path} names no runs: a suite needs a mapping `runs` from labels to descriptions")
    _check(path, content)
    runs = {str(label): run for label, run in content["runs"].items()}
    seeds = tuple(content.get("seeds") or (1,))
    reference = content.get("reference") or ()
    references = (reference,) if isinstance(reference, str) else reference
    trainings = [read_training(folder, label, seed) for label in runs for seed in seeds]
    return Suite(
        name=visible(str(content.get("name", suite_dir.name))),
        folder=folder,
        descriptions={label: visible(" ".join(_description(run).split())) for label, run in runs.items()},
        reference=tuple(visible(str(label)) for label in references),
        control=visible_tree(content.get("control")),
        seeds=seeds,
        trainings=tuple(_comparable(trainings)),
        analysis="analysis" in content,
    )


def _check(path: Path, content: dict[str, Any]) -> None:
    """Raises ValueError if a key that the report reads has a value of another kind than it must have."""
    runs, seeds, reference, control = (content.get(key) for key in ("runs", "seeds", "reference", "control"))
    different = (
        isinstance(seeds, list)
        and all(type(seed) is int and seed >= 0 for seed in seeds)
        and len(set(seeds)) == len(seeds)
    )
    labels = isinstance(reference, list) and all(isinstance(label, str | int) for label in reference)
    for label in runs if isinstance(runs, dict) else ():
        # A label is a part of the names of folders and figures.
        if not re.fullmatch(NAME_PATTERN, str(label)):
            raise ValueError(
                f"{path}: runs has the label {label!r}, but a label is of letters, digits, '_', '.' and '-'"
            )
    for key, fits, allowed in (
        ("runs", isinstance(runs, dict), "a mapping from labels to descriptions"),
        ("seeds", seeds is None or different, "a list of different whole numbers of at least 0, such as [1, 2]"),
        ("reference", reference is None or isinstance(reference, str) or labels, "a label in runs, or a list of them"),
        ("control", control is None or isinstance(control, str), "a label in runs"),
    ):
        if not fits:
            raise ValueError(f"{path}: {key} is {content[key]!r}, but must be {allowed}")


def read_training(suite: SuiteFolder, label: str, seed: int) -> Training:
    """Reads one run's folder. The state is finished, or failed, stopped, running or missing with a reason."""
    folder = suite.training(label, seed)
    status = folder.read_status()
    state, reason = status.state, status.reason
    evaluation, ablation, notes = None, None, []
    if state == "finished":
        try:
            evaluation, left_out = read_evaluation(folder, status.step)
            notes += [f"left out of its evaluation: {line}" for line in left_out]
        except DAMAGED as error:
            state, reason = "failed", f"its evaluation cannot be used: {_words(error)}"
    elif state == MISSING:
        reason = "not started"
    elif reason is None:
        reason = f"cut off at step {status.step} of {status.steps}" if state == "running" else "no reason recorded"
    if evaluation is not None:
        try:
            ablation, left_out = read_ablation(folder, evaluation.domains)
            notes += [f"left out of {folder.ablation_file.name}: {line}" for line in left_out]
        except FileNotFoundError:
            pass  # a run whose experts were not ablated
        except DAMAGED as error:
            notes.append(f"{folder.ablation_file.name} cannot be used: {_words(error)}")
    return Training(
        label=label,
        seed=seed,
        folder=folder,
        state=state,
        reason=None if reason is None else visible(" ".join(str(reason).split())),
        step=status.step,
        steps=status.steps,
        config=visible_tree(folder.read_config_tree()),
        summary=Summary.of(visible_tree(folder.read_summary().content())),
        manifest=Manifest(visible_tree(folder.read_manifest().content)),
        evaluation=evaluation and replace(evaluation, domains=tuple(map(visible, evaluation.domains))),
        ablation=ablation and replace(ablation, domains=tuple(map(visible, ablation.domains))),
        notes=tuple(map(visible, notes)),
    )


def _comparable(trainings: list[Training]) -> Iterator[Training]:
    """Yields the trainings; those that have no place beside the first usable one of the suite or of their run have
    failed."""
    first: Evaluation | None = None
    first_of_run: dict[str, Training] = {}
    for training in trainings:
        evaluation, reason = training.evaluation, None
        if evaluation is not None:
            first = first or evaluation
            shape = evaluation.counts_top_k_YDE.shape
            other = first_of_run.setdefault(training.label, training)
            assert other.evaluation is not None
            if not _same_sequences(first, evaluation):
                reason = "evaluated on other domains or sequences than the first run of the suite"
            elif shape != other.evaluation.counts_top_k_YDE.shape:
                reason = (
                    f"its counts are for {_sizes(shape)}, those of seed {other.seed} for "
                    f"{_sizes(other.evaluation.counts_top_k_YDE.shape)}"
                )
        if reason is None:
            yield training
        else:
            yield replace(training, state="failed", reason=reason, evaluation=None, ablation=None, notes=())


def _sizes(shape: tuple[int, ...]) -> str:
    return "{} MoE layers x {} domains x {} experts".format(*shape)


def _same_sequences(one: Evaluation, other: Evaluation) -> bool:
    return one.domains == other.domains and np.array_equal(one.sequence_domain_N, other.sequence_domain_N)


def _words(error: BaseException) -> str:
    """Returns the error in one line; a KeyError says only a name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"it has no {text}" if isinstance(error, KeyError) else text


def _description(run: object) -> str:
    return str(run.get("description") or "") if isinstance(run, dict) else str(run or "")
