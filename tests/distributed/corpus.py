"""A small corpus of three invented languages, and an experiment on it that trains in a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig

ALPHABETS = {"latin": "abcdefgh", "greek": "αβγδεζηθ", "digits": "01234567"}


def write_corpus(folder: Path) -> dict[str, Any]:
    """Writes text files and builds their token store.

    Returns:
        The ``data`` part of an experiment's config.
    """
    generator = random.Random(1)

    def paragraph(alphabet: str) -> str:
        return " ".join("".join(generator.choices(alphabet, k=generator.randint(2, 6))) for _ in range(20)) + "."

    domains = {}
    for name, alphabet in ALPHABETS.items():
        (folder / name).mkdir(parents=True)
        for number in range(40):
            text = "\n\n".join(paragraph(alphabet) for _ in range(generator.randint(1, 6)))
            (folder / name / f"{number:02}.txt").write_text(text, encoding="utf-8")
        domains[name] = {"sources": [{"kind": "files", "glob": f"{folder / name}/*.txt"}]}
    mix = {"name": "tiny", "vocab_size": 512, "domains": domains, "validation_fraction": 0.1, "tuning_fraction": 0.1}
    cache_dir = folder / "cache"
    build_store(MixConfig.model_validate(mix), cache_dir, lambda _: None)
    return {"mix": mix, "sequence_length": 16, "cache_dir": str(cache_dir)}


def make_experiment(data: dict[str, Any], /, **parts: Any) -> dict[str, Any]:
    """An experiment's config; every keyword argument updates the part of that name, or replaces a plain value."""
    config: dict[str, Any] = {
        "name": "tiny",
        "seed": 1,
        "data": data,
        "model": {
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "moe": {"num_experts": 8, "top_k": 2, "expert_hidden_size": 8, "capacity_factor": 4.0},
        },
        "routing": {
            "router": {"name": "top_k"},
            "balance": {
                "load_balancing_loss": {"coefficient": 0.1, "scope": "global_batch", "estimator": "previous"},
                "loss_free_bias": {"update_rate": 0.01},
                "z_loss": {},
            },
        },
        "training": {
            "steps": 6,
            "global_batch_size": 8,
            "micro_batch_size": 8,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "gradient_clipping": 0.5,
        },
        "evaluation": {"every": 3, "sequences_per_domain": 5},
        "ablation": {"sequences_per_domain": 0},
        "tracking": {"mlflow": False},
        "runtime": {"device": "cpu", "threads": 1},
    }
    for part, options in parts.items():
        config[part] = {**config.get(part, {}), **options} if isinstance(options, dict) else options
    return config
