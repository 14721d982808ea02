"""`moe-testbed analyze`: analyses checkpoints on labelled text and writes a suite's folder and its report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_testbed.launcher.analyze.hub_config import refuse_other_formats
from moe_testbed.launcher.analyze.hub_model import HUB_NAME
from moe_testbed.launcher.analyze.request import Request, Result, log
from moe_testbed.launcher.config.names import label_and_seed
from moe_testbed.launcher.errors import FAILED, MENDABLE, CheckpointError, ConfigError
from moe_testbed.launcher.report.write import print_report
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status
from moe_testbed.launcher.run.suite_folder import SuiteFolder

_HUB_CONFIG = "config.json"


def analyze(checkpoints: Sequence[str], request: Request, out: Path) -> int:
    """Analyses every checkpoint and writes the report of all of them.

    Args:
        checkpoints: folders with models of the hub's format or their names on the hub, or folders of our runs.
        out: folder of the suite; what an earlier analysis left there is replaced.

    Returns:
        Exit status: 0, or 1 if a checkpoint failed and another did not; the report tells of it.

    Raises:
        CheckpointError, ConfigError, DataError: no checkpoint could be analysed; why the first could not.
    """
    names, suite = _names(checkpoints), SuiteFolder(out)
    _refuse_trainings(suite, [suite.training(label, seed) for label, seed in names])
    analyse = _analysis(checkpoints, request)
    failures: dict[tuple[str, int], str] = {}
    first: BaseException | None = None
    runs: dict[str, dict[str, str]] = {}
    tokenizers: set[str | None] = set()
    for checkpoint, (label, seed) in zip(checkpoints, names, strict=True):
        log(f"analysing {checkpoint}")
        runs.setdefault(label, {"description": checkpoint})
        folder = suite.training(label, seed)
        try:
            _refuse_unknown(checkpoint)
            result = analyse(checkpoint)
        except MENDABLE as error:
            first = first or error
            failures[label, seed] = str(error)
            log(f"{checkpoint} failed: {error}")
        else:
            runs[label] = {"description": result.description}
            tokenizers.add(result.summary.tokenizer)
            _write(_emptied(folder), result)
    if first is not None and len(failures) == len(checkpoints):
        raise first
    for (label, seed), reason in failures.items():
        _emptied(suite.training(label, seed)).write_status(Status("failed", reason=reason))
    suite.write_config(
        {
            "name": re.sub(r"[^\w.-]+", "-", out.resolve().name),
            "analysis": {"mix": request.mix.name, "checkpoints": list(checkpoints)},
            "seeds": sorted({seed for _, seed in names}),
            "runs": runs,
        }
    )
    if len(tokenizers) > 1:
        log("the checkpoints have different tokenizers: their losses are per token and cannot be compared")
    print_report(out)
    return FAILED if failures else 0


def _analysis(checkpoints: Sequence[str], request: Request) -> Callable[[str], Result]:
    """Returns what analyses the checkpoints, of which all are runs or none is."""
    ours = [checkpoint for checkpoint in checkpoints if _is_run(checkpoint)]
    others = [checkpoint for checkpoint in checkpoints if (Path(checkpoint) / _HUB_CONFIG).is_file()]
    if ours and others:
        raise ConfigError(
            f"{ours[0]} is one of our runs and {others[0]} a model of the hub's format: they read the text in "
            "different pieces; analyse them into two folders, which `moe-testbed report A B` compares"
        )
    if ours:
        from moe_testbed.launcher.analyze.run_analysis import RunAnalysis

        return RunAnalysis(request)
    from moe_testbed.launcher.analyze.hub_analysis import HubAnalysis

    return HubAnalysis(request)


def _is_run(checkpoint: str) -> bool:
    return RunFolder(Path(checkpoint)).is_run


def _refuse_unknown(checkpoint: str) -> None:
    """Raises CheckpointError if a path is no kind of checkpoint."""
    folder = Path(checkpoint)
    if SuiteFolder(folder).is_suite:
        example = SuiteFolder(folder).training("LABEL", 1).path
        raise CheckpointError(f"{folder} is a suite's folder; name the runs in it, such as {example}")
    if not _is_run(checkpoint):
        refuse_other_formats(folder)
    if folder.is_dir() and not _is_run(checkpoint) and not (folder / _HUB_CONFIG).is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint: neither {_HUB_CONFIG} (a model of the hub's format) nor "
            f"{RunFolder(folder).config_file.name} (a run)"
        )
    if not folder.is_dir() and not HUB_NAME.fullmatch(checkpoint):
        raise CheckpointError(f"there is no folder {folder}, and a model on the hub is named OWNER/NAME")


def _names(checkpoints: Sequence[str]) -> list[tuple[str, int]]:
    """Returns the label and the seed of each checkpoint in the suite, every pair once.

    Folders named LABEL-seedN are seed N of LABEL, if every label is there with every seed; else each has its own label.
    """
    names = [
        re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(checkpoint).resolve().name).lstrip("_.-") or "checkpoint"
        for checkpoint in checkpoints
    ]
    split = [found for name in names if (found := label_and_seed(name)) is not None]
    pairs = set(split)
    labels, seeds = {label for label, _ in pairs}, {seed for _, seed in pairs}
    if len(pairs) == len(names) == len(labels) * len(seeds):
        return split
    unique: list[str] = []
    for name in names:
        unique.append(name if name not in unique else f"{name}-{names[: len(unique) + 1].count(name)}")
    return [(name, 1) for name in unique]


def _refuse_trainings(suite: SuiteFolder, targets: Sequence[RunFolder]) -> None:
    """Raises ConfigError if a folder that would be replaced holds something else than an analysis."""
    if (
        RunFolder(suite.path).is_run
        or (suite.is_suite and "analysis" not in suite.read_config_tree())
        or any(folder.is_run and "analysed" not in folder.read_config_tree() for folder in targets)
    ):
        raise ConfigError(f"{suite.path} holds trainings, which an analysis must not overwrite; choose another --out")


def _emptied(folder: RunFolder) -> RunFolder:
    shutil.rmtree(folder.path, ignore_errors=True)
    folder.create()
    return folder


def _write(folder: RunFolder, result: Result) -> None:
    folder.write_config_tree(result.config)
    folder.write_summary(result.summary)
    folder.write_manifest(result.manifest)
    folder.write_evaluation(result.evaluation)
    if result.ablation:
        folder.write_ablation(result.ablation)
    step = result.evaluation.step
    folder.write_status(Status("finished", step, step))
