"""report.html: one file without links to anything outside it, from the results, the figures and the run folders."""

from __future__ import annotations

import base64
import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from moe_testbed.launcher.report.definitions import DEFINITIONS
from moe_testbed.launcher.report.records import Suite
from moe_testbed.launcher.report.results import ranked
from moe_testbed.launcher.report.table import COLUMNS, DROPPING, LEGEND, Cell, drop_cells, status
from moe_testbed.launcher.report.words import NOTHING, failures, headlines, number, verdict

if TYPE_CHECKING:
    from moe_testbed.launcher.report.figures import Picture

MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}

_SHOWN = ("index", "package", "version", "path", "name", "split", "glob", "field", "column", "revision", "sha256")
"""What the page shows of a source; the whole manifest follows below the table."""


def render(suite: Suite, results: dict[str, Any], pictures: list[Picture]) -> str:
    """The page. Everything that comes from a run's folder is escaped."""
    source = resources.files(__package__).joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    runs = ranked(results)
    return environment.from_string(source).render(
        suite=results["suite"],
        subtitle=_subtitle(suite, results),
        headlines=headlines(results),
        verdicts=[verdict(run, results) for run in runs],
        columns=COLUMNS,
        legend=LEGEND,
        rows=[{"run": run, "status": status(run), "cells": [column.cell(run) for column in COLUMNS]} for run in runs],
        failures=failures(runs),
        domains=results["domains"],
        domain_rows=[
            {"run": run, "cells": [_loss_cell(run["loss_by_domain"][domain]) for domain in results["domains"]]}
            for run in runs
            if run["loss"]["mean"] is not None
        ],
        drop_columns=(*results["domains"], *DROPPING),
        drop_rows=[{"run": run, "cells": drop_cells(run)} for run in runs if run["drop_rate"]["mean"]],
        figures={
            section: [(picture, _source(picture)) for picture in pictures if picture.section == section]
            for section in ("overview", "curves", "domains", "layers", "routing")
        },
        definitions=DEFINITIONS,
        manifest=_manifest(suite),
        reproduction=_reproduction(suite),
    )


def _subtitle(suite: Suite, results: dict[str, Any]) -> str:
    finished = sum(training.evaluation is not None for training in suite.trainings)
    steps = sorted({training.steps for training in suite.trainings if training.evaluation is not None})
    parts = [
        _count(len(results["runs"]), "run"),
        _count(len(suite.seeds), "seed"),
        f"{finished} of {len(suite.trainings)} trainings finished",
        _count(len(results["domains"]), "domain"),
    ]
    if steps:
        parts.append(" or ".join(f"{count:,}" for count in steps) + " steps")
    return " · ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _loss_cell(stat: dict[str, Any]) -> Cell:
    spread = stat["spread"]
    return Cell(number(stat["mean"]), "" if spread is None else f"± {number(spread)}", stat["mean"])


def _source(picture: Picture) -> str:
    # Heat maps are pictures of cells; as PNG they are smaller and drawn the same by every browser.
    suffix, content = (".png", picture.png) if picture.section == "routing" else (".svg", picture.svg)
    return f"data:{MEDIA_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def _manifest(suite: Suite) -> dict[str, Any] | None:
    """The manifest of the first run that has one, as a table by domain and whole; and whether other runs differ."""
    manifests = [training.manifest for training in suite.trainings if training.manifest]
    if not manifests:
        return None
    manifest = manifests[0]
    domains = manifest.get("domains")
    by_domain = domains if isinstance(domains, dict) else {}
    splits = list(dict.fromkeys(split for domain in by_domain.values() for split in domain.get("splits", {})))
    return {
        "splits": splits,
        "domains": [
            {
                "name": name,
                "licence": domain.get("licence", NOTHING),
                "sources": [
                    ", ".join(f"{key} {source[key]}" for key in _SHOWN if source.get(key))
                    for source in domain.get("sources", [])
                ],
                "tokens": [domain.get("splits", {}).get(split, {}).get("tokens") for split in splits],
            }
            for name, domain in by_domain.items()
        ],
        "dropped": manifest.get("dropped") or {},
        "differs": any(other != manifest for other in manifests),
        "whole": json.dumps(manifest, indent=1, ensure_ascii=False),
    }


def _reproduction(suite: Suite) -> dict[str, Any]:
    """Commands, versions, commits and machines, each once, in the order of the runs."""
    summaries = [training.summary for training in suite.trainings if training.summary]

    def each(key: str) -> list[str]:
        return list(dict.fromkeys(str(summary[key]) for summary in summaries if summary.get(key)))

    versions = {
        name: ", ".join(dict.fromkeys(str(s["versions"][name]) for s in summaries if name in s.get("versions", {})))
        for name in dict.fromkeys(name for summary in summaries for name in summary.get("versions", {}))
    }
    return {
        "commands": each("command"),
        "commits": each("commit"),
        "hardware": each("hardware"),
        "versions": versions,
        "suite": yaml.safe_dump(yaml.safe_load((suite.folder / "suite.yaml").read_text()), sort_keys=False),
        "configs": {
            f"{training.label}, seed {training.seed}": yaml.safe_dump(training.config, sort_keys=False)
            for training in suite.trainings
            if training.config
        },
    }
