"""What was written into a run's folder, and what a store says of it through MLflow's own client."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from moe_testbed.launcher.tracking.state import read_ledger

History = Counter[tuple[str, int, float]]


def written(run_dir: Path) -> History:
    """(key, step, value) of everything in metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Counter(
        (f"{line['kind']}/{key}", line["step"], float(value))
        for line in lines
        for key, value in line.items()
        if key not in ("kind", "step", "seconds") and math.isfinite(value)
    )


def stored(client: Any, run_id: str) -> History:
    """(key, step, value) of everything that the store has over time; the report's results and the ledger left out."""
    keys = [key for key in client.get_run(run_id).data.metrics if not key.startswith(("result/", "ledger/"))]
    return Counter((key, point.step, point.value) for key in keys for point in client.get_metric_history(run_id, key))


def run_id_of(folder: Path, uri: str) -> str:
    run_id = read_ledger(folder, uri).run_id
    assert run_id is not None
    return run_id


def runs_of(client: Any, experiment: str, search: str = "", **options: Any) -> list[Any]:
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    return list(client.search_runs([experiment_id], search, **options))


def names(runs: list[Any]) -> set[str]:
    return {run.info.run_name for run in runs}


def paths(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    """All artifacts of a run."""
    found: set[str] = set()
    for artifact in client.list_artifacts(run_id, folder):
        found |= paths(client, run_id, artifact.path) if artifact.is_dir else {artifact.path}
    return found
