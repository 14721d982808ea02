"""report.html: one file without links to anything outside it, from the results, the figures and the run folders."""

from __future__ import annotations

import base64
import json
import struct
from typing import TYPE_CHECKING, Any

import yaml

from moe_testbed.launcher.report.numbers.pairwise import pairs
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.page.definitions import DEFINITIONS
from moe_testbed.launcher.report.page.layout import Image, Section, grouped, sections
from moe_testbed.launcher.report.page.templates import render_template
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.report.tables.domain_tables import domain_tables
from moe_testbed.launcher.report.tables.table import legend, metric_cell, shown_columns, status, topic
from moe_testbed.launcher.report.words import NOTHING, failures, headlines, verdict
from moe_testbed.routing.metrics import REPORTED, Metric

if TYPE_CHECKING:
    from moe_testbed.launcher.report.figures.drawing import Picture
    from moe_testbed.launcher.report.tables.extra_tables import ExtraTable

ROLES = ("reference", "control", "learned", "fixed", "unknown")
LARGE = 200_000
"""Bytes beyond which a figure stands on the page as PNG instead of SVG."""

_SHOWN = ("index", "package", "version", "path", "name", "split", "glob", "field", "column", "revision", "sha256")
"""What the page shows of a source; the whole manifest follows below the table."""


def render(suite: Suite, results: dict[str, Any], pictures: list[Picture], tables: list[ExtraTable]) -> str:
    """Returns the page. Everything that comes from a run's folder is escaped."""
    runs = ranked(results)
    labels = [run["label"] for run in runs]
    groups = grouped(shown_columns(results))
    columns = [column for group in groups for column in (*group.main, *group.more)]
    parts = sections([as_image(picture, labels) for picture in pictures], [*domain_tables(results), *tables])
    compared = [run["label"] for run in runs if run["loss"]["mean"] is not None]
    return render_template(
        "report.html",
        title=f"{results['suite']}: {topic(results)}",
        subtitle=_subtitle(suite, results),
        headlines=headlines(results),
        links=_links(parts, compared),
        roles=[role for role in ROLES if any(run["role"] == role for run in runs)],
        groups=groups,
        columns=columns,
        more=[column for group in groups for column in group.more],
        rows=[
            {"run": run, "status": status(run), "cells": [metric_cell(column, run) for column in columns]}
            for run in runs
        ],
        legend=legend(columns),
        missing=[*failures(runs), *results["notes"]],
        embedded_data=_embedded_data(suite, results, runs, columns),
        verdicts=[verdict(run, results) for run in runs],
        sections=parts,
        labels=labels,
        compared=compared,
        choices=list(zip(("First run", "Second run"), _first_choice(results, compared), strict=False)),
        pairs_after=parts[0].name if parts else None,
        explained={metric.column_title: metric.name for metric in REPORTED if metric.column is None},
        definitions=DEFINITIONS,
        manifest=_manifest(suite),
        reproduction=_reproduction(suite),
    )


def _first_choice(results: dict[str, Any], compared: list[str]) -> list[str]:
    """The pair shown at first: the reference and the best learned run, or the first two of the table."""
    rival = results["reference"]["lead_over_best_learned"] or results["reference"]["lead_over_best_other"]
    pair = [results["reference"]["best"], rival["label"] if rival else None]
    return pair if all(label in compared for label in pair) else compared[:2]


def _links(parts: list[Section], compared: list[str]) -> list[tuple[str, str]]:
    """A goal of the navigation: a section's id and its short title."""
    links = [("table", "Results"), ("verdicts", "In words")]
    for place, section in enumerate(parts):
        links.append((section.name, section.heading.short))
        if place == 0 and len(compared) > 1:
            links.append(("compare", "Two runs"))
    return [*links, ("definitions", "Definitions"), ("data", "Data"), ("reproduce", "Reproduce")]


def _embedded_data(
    suite: Suite, results: dict[str, Any], runs: list[dict[str, Any]], columns: list[Metric]
) -> dict[str, Any]:
    """What the page's script filters by and compares: the runs in the table's order, and the leads between them."""
    return {
        "domains": results["domains"],
        "metrics": [column.column_title for column in columns],
        "runs": [
            {
                **{name: run[name] for name in ("label", "role", "router", "description", "causal")},
                "cells": [vars(metric_cell(column, run)) for column in columns],
                "domains": [run["loss_by_domain"][domain]["mean"] for domain in results["domains"]],
            }
            for run in runs
        ],
        "pairs": pairs(suite, [run["label"] for run in runs]),
    }


def as_image(picture: Picture, labels: list[str]) -> Image:
    """The picture as the page shows it; its name ends with the label of its run, if it belongs to one of these."""
    # Heat maps are pictures of cells; as PNG they are smaller and drawn the same by every browser.
    as_png = picture.heat_map or len(picture.svg) > LARGE
    kind, content = ("png", picture.png) if as_png else ("svg+xml", picture.svg)
    width, height = struct.unpack(">II", picture.png[16:24])
    run = picture.name.partition("_")[2]
    return Image(
        name=picture.name,
        section=picture.section,
        title=picture.title,
        caption=picture.caption,
        source=f"data:image/{kind};base64,{base64.b64encode(content).decode()}",
        width=width,
        height=height,
        run=run if run in labels else None,
    )


def _subtitle(suite: Suite, results: dict[str, Any]) -> str:
    finished = sum(training.evaluation is not None for training in suite.trainings)
    steps = sorted({training.steps for training in suite.trainings if training.evaluation is not None} - {0})
    done = "checkpoints analysed" if suite.analysis else "trainings finished"
    parts = [
        _count(len(results["runs"]), "run"),
        _count(len(suite.seeds), "seed"),
        f"{finished} of {len(suite.trainings)} {done}",
        _count(len(results["domains"]), "domain"),
    ]
    if steps:
        parts.append(" or ".join(f"{count:,}" for count in steps) + " steps")
    return " · ".join(parts)


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _manifest(suite: Suite) -> dict[str, Any] | None:
    """The manifest of the first run that has one, as a table by domain and whole; and whether other runs differ."""
    manifests = [training.manifest for training in suite.trainings if training.manifest.content]
    if not manifests:
        return None
    manifest = manifests[0]
    splits = list(dict.fromkeys(split for domain in manifest.domains.values() for split in domain.tokens))
    return {
        "splits": splits,
        "domains": [
            {
                "name": name,
                "licence": domain.licence or NOTHING,
                "sources": [
                    ", ".join(f"{key} {source[key]}" for key in _SHOWN if source.get(key)) for source in domain.sources
                ],
                "tokens": [domain.tokens.get(split) for split in splits],
            }
            for name, domain in manifest.domains.items()
        ],
        "dropped": manifest.dropped,
        "differs": any(other != manifest for other in manifests),
        "whole": json.dumps(manifest.content, indent=1, ensure_ascii=False),
    }


def _reproduction(suite: Suite) -> dict[str, Any]:
    """Commands, versions, commits and machines, each once, in the order of the runs."""
    summaries = [training.summary for training in suite.trainings]

    def each(key: str) -> list[str]:
        return list(dict.fromkeys(value for summary in summaries if (value := getattr(summary, key))))

    versions = {
        name: ", ".join(dict.fromkeys(str(s.versions[name]) for s in summaries if name in s.versions))
        for name in dict.fromkeys(name for summary in summaries for name in summary.versions)
    }
    return {
        "commands": each("command"),
        "commits": each("commit"),
        "hardware": each("hardware"),
        "versions": versions,
        "suite": yaml.safe_dump(suite.folder.read_config_tree(), sort_keys=False),
        "configs": {
            f"{training.label}, seed {training.seed}": yaml.safe_dump(training.config, sort_keys=False)
            for training in suite.trainings
            if training.config
        },
    }
