"""What does the study find? The tables and pictures of docs/results.md: seven suites, some hours on two cores.

    python benchmarks/study.py [--runs runs] [--pictures docs/images]

Trains the suites configs/suites/study_*.yaml, or what of them is missing, and prints their tables.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
from suite_tables import Runs, Stat, loss, recovered, routing, text

from moe_testbed.launcher.report.numbers.results import read_results

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SUITES = ("scopes", "sweep_loss", "sweep_bias", "scopes_best", "routers", "choices", "capacity")
SCOPES = ("token", "sequence", "document", "micro_batch", "data_parallel", "global_batch", "window")
ROUTERS = ("learned", "frozen", "random", "language_guided")
Table = list[list[str]]


def read(folder: Path) -> Runs:
    """Returns the results of a suite's runs by label."""
    return {run["label"]: run for run in read_results(folder)["runs"]}


def scopes(runs: Runs, balancer: str) -> Table:
    """Returns one balancer in every scope, and below it the reference and its control."""
    labels = {f"{balancer}-{scope}": f"`{scope}`" for scope in SCOPES} | {
        label: f"{label.replace('_', ' ')}, no balancer" for label in ("reference_hash", "permuted_reference")
    }
    rows = [[shown, *_columns(runs[label])] for label, shown in labels.items() if label in runs]
    return [["scope", *HEAD], *rows]


HEAD = ["loss", "recovered", "domain information", "purity", "effective experts", "max violation"]


def _columns(run: dict[str, Any]) -> list[str]:
    metrics = [("domain_information", 2), ("purity", 2), ("normalised_effective_experts", 2), ("max_violation", 1)]
    return [text(loss(run), 3), recovered(run), *(text(routing(name)(run), digits) for name, digits in metrics)]


def sweep(runs: Runs) -> Table:
    """Returns the loss on the tuning split by coefficient and scope, the lowest of each scope in bold."""
    coefficients = list(dict.fromkeys(label.split("-")[0] for label in runs))
    rows = []
    for scope in SCOPES:
        found = {c: runs[f"{c}-{scope}"]["loss"]["mean"] for c in coefficients if f"{c}-{scope}" in runs}
        if found:
            best = min(found.values())
            shown = [f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in found.values()]
            rows.append([f"`{scope}`", *shown])
    return [["scope", *(c[1:] for c in coefficients)], *rows]


def routers(runs: Runs) -> Table:
    """Returns all routers by rising loss."""
    rows = [
        [
            f"`{run['label']}`",
            "" if run["causal"] else "**not causal**",
            run["role"],
            *_columns(run),
            text(run["experts_per_token"], 1),
        ]
        for run in sorted(runs.values(), key=lambda run: run["loss"]["mean"])
    ]
    return [["router", "", "kind", *HEAD, "experts per token"], *rows]


def choices(runs: Runs, of: Callable[[dict[str, Any]], Stat], digits: int) -> Table:
    """Returns unit x k x depth, with one column for each router."""
    rows = []
    for unit in ("token", "sequence"):
        for k in ("top1", "top2"):
            for depth in ("layer_wise", "global"):
                cells = [text(of(runs[f"{unit}-{k}-{depth}-{router}"]), digits) for router in ROUTERS]
                rows.append([unit, k[3:], depth, *cells])
    return [["unit", "k", "depth", *(router.replace("_", " ") for router in ROUTERS)], *rows]


def capacity(runs: Runs) -> Table:
    """Returns capacity factor x scope: loss, dropped assignments, domain information before and after dropping."""
    rows = []
    for factor in ("f1.0", "f1.25", "f2.0"):
        for scope in ("sequence", "micro_batch", "global_batch"):
            run = runs[f"{factor}-{scope}"]
            before, after = routing("domain_information"), routing("domain_information", "top_k_kept")
            after_text = text(after(run), 2) if "top_k_kept" in run["routing"] else text(before(run), 2)
            dropped = text(run["drop_rate"], 1, percent=True)
            rows.append([factor[1:], f"`{scope}`", text(loss(run), 3), dropped, text(before(run), 2), after_text])
    return [["factor", "scope", "loss", "dropped", "domain inf.", "after dropping"], *rows]


def bars(path: Path, labels: list[str], series: dict[str, list[Stat]], title: str) -> None:
    """Draws horizontal points with the spread over seeds as a line."""
    figure, axes = plt.subplots(figsize=(7.0, 0.34 * len(labels) + 1.2), layout="constrained")
    for number, (name, stats) in enumerate(series.items()):
        places = [row + 0.18 * (number - (len(series) - 1) / 2) for row in range(len(labels))]
        means = [stat["mean"] if stat["mean"] is not None else float("nan") for stat in stats]
        spreads = [stat.get("spread") or 0.0 for stat in stats]
        axes.errorbar(means, places, xerr=spreads, fmt="osD^"[number % 4], capsize=3, markersize=5, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(title)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def pictures(runs_dir: Path, images: Path) -> None:
    """Draws the pictures of the four tables."""
    balancers = {"load-balancing loss": "loss", "loss-free bias": "bias"}
    runs = read(runs_dir / "study_scopes")
    shown = [scope for scope in SCOPES if f"loss-{scope}" in runs]
    for name, of, title in (
        ("information", routing("domain_information"), "domain information (0: none, 1: all)"),
        ("loss", loss, "validation loss, nats per token"),
    ):
        series = {label: [of(runs[f"{by}-{scope}"]) for scope in shown] for label, by in balancers.items()}
        bars(images / f"study_scopes_{name}.png", shown, series, title)
    runs = read(runs_dir / "study_routers")
    labels = sorted(runs, key=lambda label: runs[label]["loss"]["mean"])
    bars(
        images / "study_routers.png",
        [label if runs[label]["causal"] else f"{label} (not causal)" for label in labels],
        {"loss": [loss(runs[label]) for label in labels]},
        "validation loss, nats per token",
    )
    runs = read(runs_dir / "study_choices")
    rows = [f"{unit}-{k}-{depth}" for unit in ("token", "sequence") for k in ("top1", "top2") for depth in _DEPTHS]
    series = {router.replace("_", " "): [loss(runs[f"{row}-{router}"]) for row in rows] for router in ROUTERS}
    bars(images / "study_choices.png", rows, series, "validation loss, nats per token")
    runs = read(runs_dir / "study_capacity")
    scopes_shown = ("sequence", "micro_batch", "global_batch")
    series = {scope: [dict(runs[f"{f}-{scope}"]["drop_rate"]) for f in _FACTORS] for scope in scopes_shown}
    bars(images / "study_capacity.png", [f"factor {f[1:]}" for f in _FACTORS], series, "share of dropped assignments")


_DEPTHS = ("layer_wise", "global")
_FACTORS = ("f1.0", "f1.25", "f2.0")


def tables(runs_dir: Path) -> Iterator[tuple[str, Table]]:
    """Yields name and rows of every table whose suite is there."""
    makers: dict[str, tuple[str, Callable[[Runs], Table]]] = {
        "scopes_loss": ("study_scopes", lambda runs: scopes(runs, "loss")),
        "scopes_bias": ("study_scopes", lambda runs: scopes(runs, "bias")),
        "sweep_loss": ("study_sweep_loss", sweep),
        "sweep_bias": ("study_sweep_bias", sweep),
        "scopes_best_loss": ("study_scopes_best", lambda runs: scopes(runs, "loss")),
        "scopes_best_bias": ("study_scopes_best", lambda runs: scopes(runs, "bias")),
        "routers": ("study_routers", routers),
        "choices_loss": ("study_choices", lambda runs: choices(runs, loss, 3)),
        "choices_information": ("study_choices", lambda runs: choices(runs, routing("domain_information"), 2)),
        "capacity": ("study_capacity", capacity),
    }
    for name, (suite, make) in makers.items():
        if (runs_dir / suite).is_dir():
            yield name, make(read(runs_dir / suite))


def main() -> None:
    """Trains what is missing, draws the pictures and prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--pictures", type=Path, help="folder for the pictures; without it none are drawn")
    arguments = parser.parse_args()
    for suite in SUITES:
        compare = [sys.executable, "-m", "moe_testbed.launcher", "compare", f"configs/suites/study_{suite}.yaml"]
        subprocess.run([*compare, "--jobs", "auto", "--runs-dir", str(arguments.runs)], check=True)
    if arguments.pictures:
        pictures(arguments.runs, arguments.pictures)
    print(json.dumps({"tables": dict(tables(arguments.runs))}, ensure_ascii=False))


if __name__ == "__main__":
    main()
