"""Reads what a training left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TIMINGS = ("seconds", "tokens_per_second")


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what depends on the clock and the machine."""
    lines = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [line for line in lines if line["kind"] != "system"]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in told]


def read_evaluations(run_dir: Path) -> dict[str, dict[str, npt.NDArray[Any]]]:
    """File name -> arrays."""
    return {path.name: dict(np.load(path)) for path in sorted((run_dir / "evaluations").iterdir())}


def read_arrays(run_dir: Path) -> dict[str, bytes]:
    """All files of arrays."""
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in sorted(run_dir.rglob("*.npz"))}


def read_weights(run_dir: Path) -> dict[str, Tensor]:
    """Weights and buffers of the newest checkpoint, gathered from the files of all experts."""
    checkpoint = max((run_dir / "checkpoints").glob("step_*"))
    weights: dict[str, Tensor] = {}
    for path in sorted(checkpoint.glob("*model_states.pt")):
        state = torch.load(path, weights_only=False)
        part = state if path.name.startswith("layer_") else state["module"]
        weights |= {name: value for name, value in part.items() if isinstance(value, Tensor)}
    return weights


def assert_same_run(first: Path, second: Path) -> None:
    """Metrics, evaluations, statistics, analysis and final weights agree bit for bit."""
    assert read_metrics(first) == read_metrics(second)
    arrays, others = read_arrays(first), read_arrays(second)
    assert arrays.keys() == others.keys()
    assert [name for name, content in arrays.items() if content != others[name]] == []
    torch.testing.assert_close(read_weights(first), read_weights(second), rtol=0, atol=0)
