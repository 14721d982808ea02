"""The files of a comparison of suites: comparison.html, comparison.json, comparison.csv and figures/."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_testbed.launcher.report.figures.drawing import Picture
from moe_testbed.launcher.report.figures.figures import save
from moe_testbed.launcher.report.page.definitions import DEFINITIONS
from moe_testbed.launcher.report.page.page import ROLES, as_image
from moe_testbed.launcher.report.page.templates import render_template
from moe_testbed.launcher.report.suites.comparison import COMPARED
from moe_testbed.launcher.report.suites.figures import draw_comparison
from moe_testbed.launcher.report.suites.words import headlines, metric_tables, unmatched
from moe_testbed.launcher.report.tables.files import write_csv
from moe_testbed.launcher.run.files import write_atomically


def write_comparison(comparison: dict[str, Any], folder: Path) -> Path:
    """Writes all files into the folder, which is made where it is missing; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = list(draw_comparison(comparison))
    save(pictures, folder / "figures")
    text = json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False)
    write_atomically(folder / "comparison.json", text + "\n")
    heads = ("run", "role", "metric", "suite", "less", "value", "low", "high", "over", "paired")
    write_csv(folder / "comparison.csv", heads, _csv_rows(comparison))
    page = folder / "comparison.html"
    write_atomically(page, render_comparison(comparison, pictures))
    return page


def render_comparison(comparison: dict[str, Any], pictures: list[Picture]) -> str:
    """Returns the page. Everything that comes from a run's folder is escaped."""
    runs = comparison["runs"]
    return render_template(
        "comparison.html",
        suites=comparison["suites"],
        headlines=headlines(comparison),
        unmatched=unmatched(comparison),
        roles=[role for role in ROLES if any(run["role"] == role for run in runs)],
        labels=[run["label"] for run in runs],
        sections=[
            (table, [as_image(picture, []) for picture in pictures if picture.section == metric])
            for metric, table in metric_tables(comparison).items()
        ],
        definitions=[definition for definition in DEFINITIONS if definition.metric.compared],
        embedded_data={
            "runs": [{key: run[key] for key in ("label", "role", "router", "description", "causal")} for run in runs]
        },
    )


def _csv_rows(comparison: dict[str, Any]) -> Iterator[tuple[object, ...]]:
    """A row for each value and each difference; `less` names the suite that was subtracted."""
    first, *others = [suite["name"] for suite in comparison["suites"]]
    for run in comparison["runs"]:
        for metric in COMPARED:
            head = (run["label"], run["role"], metric)
            for name, estimates in zip((first, *others), run["suites"], strict=True):
                if estimates is not None:
                    yield (*head, name, "", *(estimates[metric][key] for key in ("value", "low", "high", "over")), "")
            for name, found in zip(others, run["differences"], strict=True):
                if found is not None:
                    keys = ("value", "low", "high", "over", "paired")
                    yield (*head, name, first, *(found[metric][key] for key in keys))
