"""The small world in which the parts of the campaign train: a corpus of two domains, an experiment and a suite."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import yaml

ALPHABETS = {"letters": "abcdefgh", "digits": "01234567"}
COMMAND = ("-m", "moe_testbed.launcher")


def write_world(folder: Path, **parts: dict[str, Any]) -> Path:
    """Writes the corpus and mix.yaml, experiment.yaml and suite.yaml into a folder.

    Args:
        parts: updates of the parts of the experiment, by name.

    Returns:
        The experiment's file. All paths in it are relative to the folder.
    """
    generator = random.Random(1)
    for name, alphabet in ALPHABETS.items():
        (folder / name).mkdir(parents=True)
        for number in range(24):
            text = "\n\n".join(_paragraph(generator, alphabet) for _ in range(generator.randint(1, 4)))
            (folder / name / f"{number:02}.txt").write_text(text, encoding="utf-8")
    domains = {name: {"sources": [{"kind": "files", "glob": f"{name}/*.txt"}]} for name in ALPHABETS}
    fractions = {"validation_fraction": 0.1, "tuning_fraction": 0.1}
    mix = {"name": "campaign", "vocab_size": 512, "domains": domains, **fractions}
    _write(folder / "mix.yaml", mix)
    experiment: dict[str, Any] = {
        "name": "small",
        "data": {"mix": "mix.yaml", "sequence_length": 16},
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "moe": {"num_experts": 4, "top_k": 2, "expert_hidden_size": 8},
        },
        "routing": {
            "router": {"name": "top_k"},
            "balance": {"load_balancing_loss": {"coefficient": 0.1}, "loss_free_bias": {"update_rate": 0.01}},
        },
        "training": {"steps": 12, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01},
        "evaluation": {"every": 4, "sequences_per_domain": 2},
        "probe": {"points": 4},
        "ablation": {"sequences_per_domain": 1},
        "checkpoint": {"every": 4, "keep": 2},
        "tracking": {"mlflow": False},
        # A rank that is killed before it has met the others leaves them waiting for so long.
        "parallel": {"slow_timeout_seconds": 90.0},
        "runtime": {"device": "cpu", "threads": 1},
    }
    for part, options in parts.items():
        experiment[part] = {**experiment.get(part, {}), **options}
    _write(folder / "experiment.yaml", experiment)
    runs = {"one": {"overrides": {"model.moe.top_k": 1}}, "two": {}}
    _write(folder / "suite.yaml", {"name": "pair", "experiment": "experiment.yaml", "reference": ["two"], "runs": runs})
    return folder / "experiment.yaml"


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """Returns the variables of a command in a world: one thread, no GPU, an MLflow store of its own."""
    own = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "GLOO_SOCKET_IFNAME": "lo",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "COLUMNS": "200",
    }
    return {**os.environ, **own, **variables}


def _paragraph(generator: random.Random, alphabet: str) -> str:
    return " ".join("".join(generator.choices(alphabet, k=generator.randint(2, 6))) for _ in range(20)) + "."


def _write(path: Path, content: Any) -> None:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False), encoding="utf-8")
