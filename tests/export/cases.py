"""Models to export, and texts to compare them on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_testbed.launcher.checkpoint.own_run import OwnRun, open_run
from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.launcher.export.check import random_texts
from moe_testbed.launcher.export.export import load_model
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RoutingContext

MOE = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 16}
DENSE = {"dense_baseline": True}
ENCODER: dict[str, Any] = {"model": {"architecture": "encoder"}, "objective": {"name": "masked"}}
BOTH: dict[str, Any] = {
    "model": {"architecture": "encoder_decoder"},
    "objective": {"name": "denoising", "rate": 0.3},
}
PLAIN = {"load_balancing_loss": {"coefficient": 0.01, "scope": "global_batch"}}


def with_routing(parts: Mapping[str, Any], router: Mapping[str, Any], balance: Any = None, **model: Any) -> Any:
    """These parts of a config with another router, and without balancers unless some are given."""
    whole = {**parts, "model": {**parts.get("model", {}), **model}}
    return whole | {"routing": {"router": dict(router), "balance": balance or "none"}}


def dense(parts: Mapping[str, Any], **model: Any) -> Any:
    """These parts of a config for a model without experts."""
    return {**parts, "model": {**parts.get("model", {}), **DENSE, **model}}


def opened(folder: Path) -> tuple[OwnRun, LanguageModel]:
    """A run and its model."""
    run = open_run(folder, None, print)
    return run, load_model(run)


def texts_for(run: OwnRun, model: LanguageModel) -> RoutingContext:
    """Texts of all lengths up to the longest, padded."""
    lengths = run.config.objective.lengths(run.config.data.sequence_length)
    return random_texts(model, special_ids(run.config, run.store.vocab_size), lengths)


def one_text(context: RoutingContext, row: int) -> RoutingContext:
    """One of the texts by itself, without its padding."""
    length = context.token_ids_BL.shape[1]
    if context.valid_BL is not None:
        length = int(context.valid_BL[row].sum())
    return replace(
        context,
        token_ids_BL=context.token_ids_BL[row : row + 1, :length],
        domain_BL=context.domain_BL[row : row + 1, :length],
        position_BL=context.position_BL[row : row + 1, :length],
        sequence_B=context.sequence_B[row : row + 1],
        valid_BL=None,
        encoder=None if context.encoder is None else one_text(context.encoder, row),
    )


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two tensors' entries."""
    return float((first - second).abs().max())
