"""What does an encoder-decoder model save that starts from an encoder? The tables of docs/recipes.md.

    python benchmarks/recipes.py [--runs runs]

Trains configs/suites/recipes.yaml, or what of it is missing: three quarters of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from suite_tables import text

from moe_testbed.launcher.report.numbers.results import ranked, read_results

_TERA = 1e12


def main() -> None:
    """Prints the tables of losses and costs, and of what is saved."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    runs_dir = parser.parse_args().runs
    compare = [sys.executable, "-m", "moe_testbed.launcher", "compare", "configs/suites/recipes.yaml"]
    subprocess.run([*compare, "--jobs", "auto", "--runs-dir", str(runs_dir)], check=True)
    results = read_results(runs_dir / "recipes")
    staged = results["stages"]
    tables = {"recipes": losses(results, staged), "recipes_saved": savings(staged)}
    print(json.dumps({"figures": {}, "tables": tables}, ensure_ascii=False))


def losses(results: dict[str, Any], staged: dict[str, Any]) -> list[list[str]]:
    """Returns the runs with their losses, and what they have taken."""
    kinds_head = ["copied", "first of a gap", "rest of a gap", "copying emerges at step"]
    rows = [["run", "loss", *kinds_head, "own 10^12 FLOPs", "with inherited ones"]]
    for run in ranked(results):
        label = run["label"]
        kinds, ledger = staged["kinds"].get(label, {}), staged["ledger"][label]
        steps = (staged["copying_step"].get(label) or {"steps": []})["steps"]
        together = ledger["flops"]["mean"] + ledger["inherited_flops"]["mean"]
        rows.append(
            [
                f"`{label}`",
                text(run["loss"], 3),
                *(text(kinds[kind]["loss"], 2) if kind in kinds else "–" for kind in ("copied", *_GAPS)),
                ", ".join("never" if step is None else f"{step:.0f}" for step in steps) or "–",
                f"{ledger['flops']['mean'] / _TERA:.2f}",
                f"{together / _TERA:.2f}",
            ]
        )
    return rows


_GAPS = "first_of_gap", "rest_of_gap"


def savings(staged: dict[str, Any]) -> list[list[str]]:
    """Returns what each recipe saves, in both currencies and both readings."""
    rows = [["second stage", "tables", "currency", "between lengths", "within the longest"]]
    for found in staged["saved"]:
        currency = found["currency"].replace("flops", "FLOPs").replace("_", " ")
        rows.append(
            [
                found["recipe"],
                found["tables"].replace("_", " "),
                currency,
                share(found["ends"]),
                share(found["mid_run"]),
            ]
        )
    return rows


def share(found: dict[str, Any]) -> str:
    """Returns a saved share with its interval, and in how many seeds the loss from scratch was reached."""
    if not found["reached"]:
        return f"not reached (0 of {found['of']} seeds)"
    words = "at least " if found["at_least"] else ""
    bounds = "" if found["low"] is None else f" [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    missed = "" if found["reached"] == found["of"] else f" ({found['reached']} of {found['of']} seeds)"
    return f"{words}{100 * found['mean']:.0f} %{bounds}{missed}"


if __name__ == "__main__":
    main()
