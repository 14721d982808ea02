"""Run folders and suite folders as records: read leniently, so that a report of an old or broken suite is still made.

Shapes: Y MoE layers (0 for a dense model), D domains, E experts, N evaluation sequences.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from moe_testbed.launcher.files import read_json, read_json_lines


@dataclass(frozen=True)
class Evaluation:
    """The last evaluation of a run; losses in nats per token, counts of assignments before any dropping."""

    step: int
    domains: tuple[str, ...]
    tokens: int
    loss_D: NDArray[np.float64]
    sequence_loss_N: NDArray[np.float64]
    sequence_domain_N: NDArray[np.int64]
    counts_top_1_YDE: NDArray[np.int64]
    counts_top_k_YDE: NDArray[np.int64]
    dropped_YDE: NDArray[np.int64]
    shuffled_counts_top_k_YDE: NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Mean over domains of equal weight."""
        return float(self.loss_D.mean())


@dataclass(frozen=True)
class Training:
    """One run folder: one run of the suite under one seed. `evaluation` is there only if the training is usable."""

    label: str
    seed: int
    folder: Path
    state: str
    reason: str | None
    step: int
    steps: int
    config: dict[str, Any]
    summary: dict[str, Any]
    manifest: dict[str, Any]
    evaluation: Evaluation | None

    @property
    def router(self) -> str:
        """Name of the router, `dense` for the dense baseline."""
        if (self.config.get("model") or {}).get("dense_baseline"):
            return "dense"
        return str(((self.config.get("routing") or {}).get("router") or {}).get("name", "unknown"))

    def curve(self, kind: str, key: str) -> NDArray[np.float64]:
        """The (step, value) pairs [n, 2] of one value in metrics.jsonl, the last one where a step was written twice."""
        pairs = {
            line["step"]: float(line[key])
            for line in read_json_lines(self.folder / "metrics.jsonl")
            if line.get("kind") == kind and key in line and "step" in line
        }
        return np.array(sorted(pairs.items()), dtype=np.float64).reshape(-1, 2)


@dataclass(frozen=True)
class Suite:
    """A suite folder: what suite.yaml says, and a training for every run and seed, missing ones included."""

    name: str
    folder: Path
    descriptions: dict[str, str]
    reference: tuple[str, ...]
    control: str | None
    seeds: tuple[int, ...]
    trainings: tuple[Training, ...]

    def of(self, label: str) -> list[Training]:
        """The trainings of one run, in the order of the seeds."""
        return [training for training in self.trainings if training.label == label]

    def evaluations(self, label: str) -> dict[int, Evaluation]:
        """The last evaluations of one run's trainings that finished, by seed."""
        return {t.seed: t.evaluation for t in self.of(label) if t.evaluation is not None}


def read_suite(suite_dir: Path) -> Suite:
    """Read a suite folder. Raises ValueError if it has no readable suite.yaml; broken runs become failed trainings."""
    path = suite_dir / "suite.yaml"
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{suite_dir} is not a suite's folder: {path.name} cannot be read ({error})") from None
    if not isinstance(content, dict) or not content.get("runs"):
        raise ValueError(f"{path} names no runs: a suite needs a mapping `runs` from labels to descriptions")
    runs = {str(label): run for label, run in content["runs"].items()}
    seeds = tuple(int(seed) for seed in content.get("seeds") or (1,))
    reference = content.get("reference") or ()
    trainings = [read_training(suite_dir, label, seed) for label in runs for seed in seeds]
    return Suite(
        name=str(content.get("name", suite_dir.name)),
        folder=suite_dir,
        descriptions={label: _description(run) for label, run in runs.items()},
        reference=(reference,) if isinstance(reference, str) else tuple(map(str, reference)),
        control=content.get("control"),
        seeds=seeds,
        trainings=tuple(_comparable(trainings)),
    )


def read_training(suite_dir: Path, label: str, seed: int) -> Training:
    """Read one run folder. The state is finished, or failed, running or missing with a reason."""
    folder = suite_dir / f"{label}-seed{seed}"
    status = read_json(folder / "status.json")
    step, steps = int(status.get("step") or 0), int(status.get("steps") or 0)
    state, reason = str(status.get("state", "missing")), status.get("reason")
    evaluation = None
    if state == "finished":
        try:
            evaluation = read_evaluation(folder, step)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            state, reason = "failed", f"its evaluation cannot be used: {error}"
    elif state == "missing":
        reason = "not started"
    elif reason is None:
        reason = f"cut off at step {step} of {steps}" if state == "running" else "no reason recorded"
    return Training(
        label=label,
        seed=seed,
        folder=folder,
        state=state,
        reason=reason,
        step=step,
        steps=steps,
        config=_yaml(folder / "config.yaml"),
        summary=read_json(folder / "summary.json"),
        manifest=read_json(folder / "manifest.json"),
        evaluation=evaluation,
    )


def read_evaluation(folder: Path, last_step: int) -> Evaluation:
    """Read a run's last evaluation. Raises ValueError if there is none of the last step, or if it is not whole."""
    paths = sorted((folder / "evaluations").glob("step_*.npz"))
    if not paths:
        raise ValueError("there is none")
    with np.load(paths[-1]) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    if int(content["step"]) != last_step:
        raise ValueError(f"the last one is of step {int(content['step'])}, the training ended at {last_step}")
    tokens_D = content["tokens_D"].astype(np.float64)
    if np.any(tokens_D <= 0):
        raise ValueError("a domain has no tokens in it")
    return Evaluation(
        step=last_step,
        domains=tuple(map(str, content["domains"])),
        tokens=int(tokens_D.sum()),
        loss_D=content["loss_sum_D"].astype(np.float64) / tokens_D,
        sequence_loss_N=content["sequence_loss_N"].astype(np.float64),
        **{name: content[name].astype(np.int64) for name in Evaluation.__dataclass_fields__ if name in _INTEGERS},
    )


_INTEGERS = {
    "sequence_domain_N",
    "counts_top_1_YDE",
    "counts_top_k_YDE",
    "dropped_YDE",
    "shuffled_counts_top_k_YDE",
}


def _comparable(trainings: list[Training]) -> Iterator[Training]:
    """The trainings, those failed that were evaluated on other sequences than the first usable one."""
    first = next((training.evaluation for training in trainings if training.evaluation is not None), None)
    for training in trainings:
        other = training.evaluation
        if first is None or other is None or _same_sequences(first, other):
            yield training
        else:
            reason = "evaluated on other domains or sequences than the first run of the suite"
            yield replace(training, state="failed", reason=reason, evaluation=None)


def _same_sequences(one: Evaluation, other: Evaluation) -> bool:
    return one.domains == other.domains and np.array_equal(one.sequence_domain_N, other.sequence_domain_N)


def _description(run: object) -> str:
    return str(run.get("description") or "") if isinstance(run, dict) else str(run or "")


def _yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
