"""Checks what the runs of a suite start from, before any of them is trained."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.suite import SuiteRun
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder

_ENCODER = "encoder."


def check_starts(runs: Sequence[SuiteRun]) -> None:
    """Says on stderr which runs may turn out to be stale, since what they have started from is to be trained anew.

    Raises:
        ConfigError: a run has started from weights that the other one has no more, or the encoder of a run of the
            suite, or of an export, does not fit into that of one that starts from it; one line.
    """
    starting = [run for run in runs if run.config.start.encoder]
    if not starting:
        return
    # They import torch.
    from moe_testbed.launcher.checkpoint.stale import has_started
    from moe_testbed.launcher.export.folder import is_export
    from moe_testbed.launcher.export.source import open_export, refuse_stale_start

    configs = {run.name: run.config for run in runs}
    for run in starting:
        for parent in run.parents:
            _refuse_misfit(run, parent, configs[parent])
        own, parent_folder = RunFolder(run.run_dir), _parent(run)
        if not has_started(own) and is_export(parent_folder.path):
            _refuse_misfit(run, str(parent_folder.path), open_export(parent_folder.path).config)
        refuse_stale_start(own, parent_folder.path)
        if has_started(own) and run.parents and not parent_folder.is_finished:
            print(
                f"{run.name} has started from {run.parents[0]}, which is trained anew: if other weights come of it, "
                f"{run.name} is stale and fails; remove its folder to train it anew as well",
                file=sys.stderr,
            )


def _parent(run: SuiteRun) -> RunFolder:
    if run.parents:
        return RunFolder(run.run_dir.parent / run.parents[0])
    assert run.config.start.encoder is not None, "the run starts from another one"
    return RunFolder(run.config.start.encoder.folder(run.run_dir, run.seed))


def _refuse_misfit(run: SuiteRun, name: str, parent: ExperimentConfig) -> None:
    """Raises ConfigError if a run starts from an encoder of other sizes."""
    start = run.config.start.encoder
    assert start is not None, "the run starts from another one"
    place = f"{run.name} is to start from {name}"
    width, theirs = run.config.model.hidden_size, parent.model.hidden_size
    if width != theirs:
        raise ConfigError(f"{place}, and has model.hidden_size {width}, not {theirs}; make them alike")
    if start.take == "tables":
        return
    try:
        own_shapes, shapes = _encoder_shapes(run.config), _encoder_shapes(parent)
    except ConfigError:
        return  # One that cannot be built says so when it starts.
    different = next((key for key in own_shapes | shapes if own_shapes.get(key) != shapes.get(key)), None)
    if different is not None:
        own, other = (_shown(found.get(different)) for found in (own_shapes, shapes))
        raise ConfigError(
            f"{place}, but {different} {own} in the one and {other} in the other; make layers, widths, experts and "
            "routing alike"
        )


def _shown(shape: tuple[int, ...] | None) -> str:
    return "is missing" if shape is None else f"has shape {shape}"


def _encoder_shapes(config: ExperimentConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each weight of the encoder, all experts in it, by name. Raises ConfigError."""
    from moe_testbed.launcher.config.model_size import model_on_meta

    parallel = config.parallel.model_copy(update={"expert_parallel_size": 1})
    weights = model_on_meta(config.model_copy(update={"parallel": parallel})).named_parameters()
    return {name: tuple(weight.shape) for name, weight in weights if name.startswith(_ENCODER)}
