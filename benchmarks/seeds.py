"""What do three seeds of the demo say? The table of docs/results.md, and by how much the reference leads.

    python benchmarks/seeds.py [--runs runs]

Trains configs/suites/demo_seeds.yaml, or what of it is missing: half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from suite_tables import loss, recovered, routing, text

from moe_testbed.launcher.report.numbers.results import ranked, read_results


def main() -> None:
    """Prints the table and the leads."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    runs_dir = parser.parse_args().runs
    compare = [sys.executable, "-m", "moe_testbed.launcher", "compare", "configs/suites/demo_seeds.yaml"]
    subprocess.run([*compare, "--jobs", "auto", "--runs-dir", str(runs_dir)], check=True)
    results = read_results(runs_dir / "demo_seeds")
    rows = [["run", "validation loss", "recovered", "domain information", "effective experts"]]
    for run in sorted(ranked(results), key=lambda run: run["loss"]["mean"]):
        metrics = (routing("domain_information"), routing("normalised_effective_experts"))
        rows.append([f"`{run['label']}`", text(loss(run), 3), recovered(run), *(text(of(run), 2) for of in metrics)])
    leads = []
    rivals = {"control": "its control", "best_learned": "the best learned router", "best_other": "the best other one"}
    for rival, name in rivals.items():
        lead = results["reference"][f"lead_over_{rival}"]
        leads.append(f"{lead['value']:.3f} [{lead['low']:.3f}, {lead['high']:.3f}] over {name}")
    said = ", ".join(leads)
    print(f"lead of the reference in nats per token: {said}")
    print(json.dumps({"figures": {"seeds": said}, "tables": {"demo_seeds": rows}}, ensure_ascii=False))


if __name__ == "__main__":
    main()
