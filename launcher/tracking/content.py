"""Reads from folders what a tracking store is told of a run or suite besides values over time, leniently.

Nothing here knows MLflow, but for the names of tags that its pages show.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moe_testbed.launcher.config.renamed import with_new_names
from moe_testbed.launcher.errors import visible
from moe_testbed.launcher.run.array_file import DAMAGED
from moe_testbed.launcher.run.files import csv_text, value_at
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import LedgerRecord, Manifest, MoELayers
from moe_testbed.launcher.run.suite_folder import SuiteFolder
from moe_testbed.launcher.tracking.names import flatten
from moe_testbed.launcher.tracking.values import MAX_TAG_LENGTH, shortened
from moe_testbed.model.config import STACKS
from moe_testbed.routing.metrics import REPORTED

DESCRIPTION = "mlflow.note.content"
PARENT = "mlflow.parentRunId"

_RUN_FIGURES = ("routing_", "causal_")

_RUN_RESULTS = {metric.name: metric.path for metric in REPORTED if metric.tracked}
_SUITE_RESULTS: dict[str, tuple[str, ...]] = {
    name: ("reference", name) for name in ("lead_over_control", "lead_over_best_other", "lead_over_best_learned")
}


@dataclass(frozen=True)
class DatasetCard:
    """The data of a run: the mix, a digest of its manifest, and training tokens by domain."""

    name: str
    digest: str
    tokens: dict[str, int]


@dataclass(frozen=True)
class Content:
    """What is told of one folder. results: key -> value of the report; files: path of an artifact -> its content."""

    tags: dict[str, str]
    parameters: dict[str, str] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    dataset: DatasetCard | None = None
    files: dict[str, Path | str] = field(default_factory=dict)


def run_content(run_dir: Path, suite_dir: Path | None = None, more_tags: Mapping[str, str] | None = None) -> Content:
    """Returns what is told of a run's folder, with what its suite's report says of it, if it belongs to a suite.

    Every seed of a run gets the same results, the report's: means over its seeds. Tags that are empty are left out.
    """
    folder = RunFolder(run_dir)
    config, summary = folder.read_config_tree(), folder.read_summary()
    label = str(config.get("name", run_dir.name))
    tags = {
        "label": label,
        "seed": str(config.get("seed", "")),
        "router": _router(config),
        "balance": ", ".join(_balancers(config)),
        "balance_scope": ", ".join(sorted({scope for scope in _balancers(config).values() if scope})),
        "commit": summary.commit or "",
        **(more_tags or {}),
    }
    results = _ledger(LedgerRecord.of(summary.ledger))
    alone = (folder.config_file, folder.manifest_file, folder.summary_file, folder.status_file, folder.ablation_file)
    files = _files(run_dir, alone, (folder.evaluations, folder.probes))
    files |= _matrices(folder, MoELayers.of(config).names)
    if suite_dir is not None:
        suite = SuiteFolder(suite_dir)
        report = suite.read_results()
        run: Mapping[str, Any] = next((run for run in report.get("runs") or () if value_at(run, "label") == label), {})
        tags |= {"suite": suite_dir.name, "role": str(run.get("role", "")), DESCRIPTION: _run_description(run, report)}
        results |= _numbers(run, _RUN_RESULTS)
        for stack in STACKS["encoder_decoder"]:
            results |= _numbers(value_at(run, "stacks", stack), _RUN_RESULTS, f"{stack}/")
        files |= _figures_of(label, suite)
    return Content(
        _told(tags), flatten(with_new_names(config)), results, _dataset(config, folder.read_manifest()), files
    )


def suite_content(suite_dir: Path) -> Content:
    """Returns what is told of a suite's folder. A suite has no parameters, since those cannot be changed later, and its
    runs and seeds can."""
    folder = SuiteFolder(suite_dir)
    suite, report = folder.read_config_tree(), folder.read_results()
    tags = {
        "suite": suite_dir.name,
        "experiment": str(suite.get("experiment", "")),
        "reference": ", ".join(map(str, suite.get("reference") or ())),
        "control": str(suite.get("control") or ""),
        "seeds": ", ".join(map(str, suite.get("seeds") or ())),
        DESCRIPTION: _suite_description(report, folder.page.name),
    }
    alone = (folder.config_file, folder.page, folder.results_file, folder.results_table)
    files = _files(suite_dir, alone, (folder.figures, folder.tables))
    return Content(_told(tags), results=_numbers(report, _SUITE_RESULTS), files=files)


def _told(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: shortened(value, MAX_TAG_LENGTH) for key, value in tags.items() if value}


def _router(config: Mapping[str, Any]) -> str:
    return (
        "dense"
        if value_at(config, "model", "dense_baseline")
        else str(value_at(config, "routing", "router", "name") or "")
    )


def _balancers(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the scope of each balancer by its label, empty for one that has none."""
    balance = value_at(config, "routing", "balance")
    labels = balance if isinstance(balance, dict) else {}
    return {str(label): str(value_at(options, "scope") or "") for label, options in labels.items()}


def _dataset(config: Mapping[str, Any], manifest: Manifest) -> DatasetCard | None:
    if not manifest.content:
        return None
    tokens = {name: domain.tokens.get("train") or 0 for name, domain in manifest.domains.items()}
    return DatasetCard(str(value_at(config, "data", "mix", "name") or "data"), manifest.digest, tokens)


def _run_description(run: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    from moe_testbed.launcher.report.words import verdict

    with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):  # a report of an earlier version
        said = verdict(dict(run), dict(report))
        means = "Metrics `result/…` are the report's: means over the seeds of this run."
        own = "`evaluation/…` and `ledger/…` are this training's own."
        return f"**{said.subject}** {_plain(said.text)}\n\n{means} {own}"
    return ""


def _plain(text: str) -> str:
    """Returns a text in which Markdown, as MLflow shows it, finds no element, link or picture."""
    return visible(text).replace("<", "&lt;").replace("](", "]\\(")


def _suite_description(report: Mapping[str, Any], page: str) -> str:
    from moe_testbed.launcher.report.words import headlines

    with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):
        said = "\n".join(f"- {_plain(headline.text)}" for headline in headlines(dict(report)))
        return f"{said}\n\nThe whole report is the artifact `{page}`."
    return ""


def _numbers(report: Any, paths: Mapping[str, tuple[str, ...]], of: str = "") -> dict[str, float]:
    """Returns the number at each path, a mean over seeds or the value of an interval, under the key result/NAME.

    Args:
        of: what comes before the name: the stack, where the numbers are of one.
    """
    values = {}
    for name, path in paths.items():
        number = value_at(report, *path)
        values[f"result/{of}{name}"] = number.get("value", number.get("mean")) if isinstance(number, Mapping) else None
    return {key: float(value) for key, value in values.items() if isinstance(value, int | float)}


def _ledger(record: LedgerRecord | None) -> dict[str, float]:
    """Returns what this training has taken, itself and with what it has inherited, as far as that is known, under keys
    ledger/NAME."""
    if record is None:
        return {}
    values: dict[str, float | None] = {
        "flops": record.flops,
        "inherited_flops": record.inherited_flops,
        "flops_with_inherited": record.total_flops,
        "layer_units": record.layer_units,
        "inherited_layer_units": record.inherited_layer_units,
        "layer_units_with_inherited": record.total_layer_units,
    }
    by_part = {"flops": record.flops_by_part, "layer_units": record.layer_units_by_part}
    for currency, taken in by_part.items():
        parts = [part for part in (*STACKS["encoder_decoder"], "output") if part in taken]
        values |= {f"{currency}_of_{part}": taken[part] for part in parts}
    return {f"ledger/{name}": float(value) for name, value in values.items() if value is not None}


def _figures_of(label: str, suite: SuiteFolder) -> dict[str, Path | str]:
    """Returns the suite's pictures KIND_LABEL and KIND_LABEL_MORE that are of this label and of no longer one."""
    labels = {str(other) for other in suite.read_config_tree().get("runs") or ()} | {label}
    figures: dict[str, Path | str] = {}
    for kind in _RUN_FIGURES:
        for path in sorted(suite.figures.glob(f"{kind}{label}*")):
            rest = path.stem.removeprefix(kind)
            if label == max((other for other in labels if f"{rest}_".startswith(f"{other}_")), key=len, default=""):
                figures[f"{suite.figures.name}/{path.name}"] = path
    return figures


def _files(folder: Path, alone: Sequence[Path], folders: Sequence[Path]) -> dict[str, Path | str]:
    """Returns files alone and all in some folders, by their names relative to the folder of all."""
    paths = [*alone, *(path for one in folders for path in sorted(one.glob("*")) if not path.name.startswith("."))]
    return {str(path.relative_to(folder)): path for path in paths if path.is_file()}


def _matrices(folder: RunFolder, layers: Sequence[str]) -> dict[str, Path | str]:
    """Returns each table domain x expert of the last evaluation as CSV: a line per MoE layer and domain.

    Args:
        layers: the names of the layers, where they have names.
    """
    try:
        domains, tables = folder.read_expert_tables()
    except DAMAGED:  # a broken one is sent as it is
        return {}
    return {f"matrices/{name.removesuffix('_YDE')}.csv": _csv(table, domains, layers) for name, table in tables.items()}


def _csv(table_YDE: np.ndarray[Any, Any], domains: Sequence[str], layers: Sequence[str]) -> str:
    names = layers if len(layers) == len(table_YDE) else range(len(table_YDE))
    columns = ("moe_layer", "domain", *(f"expert_{expert}" for expert in range(table_YDE.shape[2])))
    return csv_text(
        columns,
        (
            (layer, visible(domain), *row_E)
            for layer, table_DE in zip(names, table_YDE.tolist(), strict=True)
            for domain, row_E in zip(domains, table_DE, strict=True)
        ),
    )
