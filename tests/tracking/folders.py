"""Folders as trainings and suites write them, without training."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

MANIFEST = {"domains": {"law": {"splits": {"train": {"tokens": 700}}}, "music": {"splits": {"train": {"tokens": 300}}}}}
SYSTEM = {"cpu_utilization_percentage": 50.0, "process_memory_megabytes": 800.0}


def make_run(folder: Path, steps: int = 30, **config: object) -> Path:
    """The folder of a finished run without metrics."""
    (folder / "evaluations").mkdir(parents=True)
    content = {"name": folder.name, "training": {"steps": steps, "betas": [0.9, 0.95]}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    (folder / "summary.json").write_text('{"parameters": 5, "commit": "c0ffee"}')
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": steps, "steps": steps}))
    np.savez(
        folder / "evaluations" / "step_00000030.npz",
        step=30,
        domains=np.array(["law", "music"]),
        counts_top_k_YDE=np.arange(12).reshape(1, 2, 6),
    )
    return folder


def append(folder: Path, steps: Iterable[int], extra: str = "", **values: object) -> None:
    """Lines of the kind train; `extra` may be a line that is cut off."""
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            line = {"kind": "train", "step": step, "seconds": step / 10, "loss": 5.0 / step, **values}
            file.write(json.dumps(line) + "\n")
        file.write(extra)


def write_state(folder: Path, state: str) -> None:
    """What the run's status.json says of it."""
    (folder / "status.json").write_text(json.dumps({"state": state}))


def append_line(folder: Path, **line: object) -> None:
    """Any one line."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def make_suite(folder: Path, **config: object) -> Path:
    """Three finished runs of two labels, one of which begins with the other, and a report."""
    for label, router, seed in (("top_k", "top_k", 1), ("top_k", "top_k", 2), ("top_k_hash", "hash", 1)):
        balance = {"load_balancing_loss": {"scope": "sequence"}, "z_loss": {}} if router == "top_k" else {}
        routing = {"router": {"name": router}, "balance": balance}
        mix = {"mix": {"name": "two"}}
        run = make_run(folder / f"{label}-seed{seed}", name=label, seed=seed, routing=routing, data=mix, **config)
        (run / "manifest.json").write_text(json.dumps(MANIFEST))
        for step in range(1, 31):
            append(run, [step])
            if step % 10 == 0:
                append_line(run, kind="system", step=step, seconds=step / 10, **SYSTEM)
                append_line(run, kind="evaluation", step=step, seconds=step / 10, cross_entropy=4.0 / step)
        (run / "statistics").mkdir()
        np.savez(run / "statistics" / "step_00000030.npz", step=30)
        np.savez(run / "analysis.npz", domains=np.array(["law", "music"]))
    suite = {"name": folder.name, "seeds": [1, 2], "control": "top_k_hash", "runs": {"top_k": {}, "top_k_hash": {}}}
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    (folder / "report.html").write_text("<!doctype html><title>report</title><p>Report of the suite.")
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "results.csv").write_text("run,mean\n")
    for name in (
        "scatter.svg",
        "routing_top_k.svg",
        "routing_top_k_all_layers.png",
        "causal_top_k.svg",
        "routing_top_k_hash.svg",
    ):
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / name).write_text(f"<svg id='{name}'/>")
    (folder / "tables").mkdir()
    (folder / "tables" / "runs.tex").write_text("\\begin{tabular}")
    return folder


def _run_results(label: str, role: str, loss: float, recovered: float | None) -> dict[str, Any]:
    information = {"domain_information": {"mean": 0.25}, "normalised_effective_experts": {"mean": None}}
    return {
        "label": label,
        "role": role,
        "loss": {"mean": loss},
        "recovered": {"value": recovered},
        "routing": {"top_k": information},
    }


RESULTS = {
    "reference": {"lead_over_control": {"value": 0.5}, "lead_over_best_other": None},
    "runs": [_run_results("top_k", "learned", 3.0, 0.75), _run_results("top_k_hash", "control", 3.5, None)],
}
