"""Trainings with every scope that does not depend on the layout: ranks, accumulation, recomputation and spread experts
against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train import driver
from tests.train.results import read_metrics, read_weights

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

SCOPED = {
    "even": {"name": "load_balancing_loss", "coefficient": 0.1, "scope": "global_batch", "estimator": "exact"},
    "windows": {"name": "load_balancing_loss", "coefficient": 0.1, "scope": "window", "window_steps": 3},
    "documents": {"name": "load_balancing_loss", "coefficient": 0.01, "scope": "document"},
    "loss_free_bias": {"update_rate": 0.01, "update": "proportional", "scope": "window"},
    "z_loss": {"coefficient": {"0": 1e-3, "4": 1e-2}},
}


def layout(make: MakeExperiment, micro: int, parallel: int, checkpointing: bool) -> dict[str, Any]:
    # Packed: several documents in a sequence, so that the scopes document and sequence differ.
    return make(
        seed=2,
        data={"packing": "packed"},
        routing={"router": {"name": "top_k"}, "balance": SCOPED},
        training={"micro_batch_size": micro, "activation_checkpointing": checkpointing},
        parallel={"expert_parallel_size": parallel},
        evaluation={"every": 0},
    )


@pytest.mark.parametrize(
    ("ranks", "micro", "parallel", "checkpointing"),
    [(1, 2, 1, True), (2, 4, 1, True), (2, 2, 2, True), (2, 4, 2, False), (4, 2, 2, False), (4, 1, 2, True)],
)
def test_trainings_with_every_scope_equal_one_process(
    ranks: int,
    micro: int,
    parallel: int,
    checkpointing: bool,
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    """Losses, counts' effect on the bias, and weights after six steps; the first step of a window is ``online``, which
    depends on the layout by design, so that windows begin with the second step: their coefficient is 0 in the first."""
    for number, options in (
        (1, layout(make_experiment, 8, 1, False)),
        (ranks, layout(make_experiment, micro, parallel, checkpointing)),
    ):
        balance = dict(options["routing"]["balance"])
        balance["windows"] = {**balance["windows"], "coefficient": {"0": 0.0, "1": 0.1}}
        options["routing"] = {**options["routing"], "balance": balance}
        folder = tmp_path / ("one" if options["training"]["micro_batch_size"] == 8 else "shared")
        run_on_ranks(driver.train, number, options, str(folder))
    lines, expected_lines = read_metrics(tmp_path / "shared"), read_metrics(tmp_path / "one")
    for line, expected in zip(lines[:6], expected_lines[:6], strict=True):
        for key in ("loss", "cross_entropy", "gradient_norm", "balance/even", "balance/documents", "balance/z_loss"):
            np.testing.assert_allclose(line[key], expected[key], rtol=1e-5, err_msg=f"{key} of step {line['step']}")
    weights, expected_weights = read_weights(tmp_path / "shared"), read_weights(tmp_path / "one")
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-4)
