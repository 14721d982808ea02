"""Checkpoints of experts on two ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch

from tests.train import driver
from tests.train.results import assert_same_run, read_weights

MakeExperiment = Callable[..., dict[str, Any]]


@pytest.fixture
def make_two_rank_experiment(make_experiment: MakeExperiment) -> MakeExperiment:
    """Two checkpoints before the end; the keyword is the expert-parallel size."""

    def make(expert_parallel_size: int) -> dict[str, Any]:
        return make_experiment(
            training=make_experiment()["training"] | {"micro_batch_size": 4},
            parallel={"expert_parallel_size": expert_parallel_size},
            checkpoint={"every": 2},
        )

    return make


@pytest.mark.parametrize(
    ("where", "number"), [("before a step", 4), ("inside a checkpoint's file", 6), ("before a checkpoint is marked", 2)]
)
def test_two_ranks_killed_continue_exactly(
    where: str,
    number: int,
    make_two_rank_experiment: MakeExperiment,
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    config = make_two_rank_experiment(2)
    run_on_ranks(driver.train, 2, config, str(tmp_path / "whole"))
    run_until_killed(driver.train_and_die, 2, config, str(tmp_path / "killed"), where, number)
    run_on_ranks(driver.train, 2, config, str(tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_names_with_expert_outside_of_moe_layers_are_kept(
    ranks: int,
    make_two_rank_experiment: MakeExperiment,
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    """DeepSpeed takes what has "expert" in its name for an expert's, but in MoE layers only."""
    config = make_two_rank_experiment(ranks)
    config["routing"] = {
        "router": {"name": f"{Path(__file__).with_name('biased_router.py')}:Biased"},
        "balance": {"expert_bias": {"name": "loss_free_bias", "update_rate": 0.01}},
    }
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "whole"))
    run_until_killed(driver.train_and_die, ranks, config, str(tmp_path / "killed"), "before a step", 4)
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    weights = read_weights(tmp_path / "whole")
    learned = [name for name in weights if "expert" in name and ".deepspeed_moe." not in name]
    assert learned == [
        *(f"blocks.{layer}.routing.router.{name}" for layer in (0, 1) for name in ("expert_bias", "expert_steps")),
        "balancing.balancers.expert_bias.bias_YE",
    ]
    assert all(weights[name].any() for name in learned), "they start from 0"


OPTIMIZER = "zero_pp_rank_1_mp_rank_00_optim_states.pt"


def rewrite(checkpoint: Path, change: Callable[[Any], None]) -> None:
    """Changes the optimizer's file of rank 1, and its size in the mark."""
    content = torch.load(checkpoint / OPTIMIZER, weights_only=False)
    change(content["optimizer_state_dict"])
    torch.save(content, checkpoint / OPTIMIZER)
    mark_size(checkpoint)


def mark_size(checkpoint: Path) -> None:
    """Lets the mark say the size that the optimizer's file has now."""
    mark = json.loads((checkpoint / "complete.json").read_text())
    mark["files"][OPTIMIZER] = (checkpoint / OPTIMIZER).stat().st_size
    (checkpoint / "complete.json").write_text(json.dumps(mark))


def take_away(checkpoint: Path) -> None:
    """As if the file had never been written."""
    (checkpoint / OPTIMIZER).unlink()
    mark = json.loads((checkpoint / "complete.json").read_text())
    del mark["files"][OPTIMIZER]
    (checkpoint / "complete.json").write_text(json.dumps(mark))


def garble(checkpoint: Path) -> None:
    """An archive that is sound, but not one of torch's; one whose bytes have changed is passed over."""
    with ZipFile(checkpoint / OPTIMIZER, "w") as archive:
        archive.writestr("content", "other")
    mark_size(checkpoint)


def of_a_smaller_model(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda state: state["param_slice_mappings"][0].pop("embedding.weight"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (take_away, rf"/step_00000002/{OPTIMIZER} cannot be read, it is damaged or missing; remove the checkpoint"),
        (garble, rf"/step_00000002/{OPTIMIZER} cannot be read, it is damaged or missing; remove the checkpoint"),
        (of_a_smaller_model, r"weights of embedding\.weight: \d,\d+ numbers are there, .* not of this model"),
    ],
)
def test_what_cannot_be_regrouped_is_one_line(
    damage: Callable[[Path], None],
    message: str,
    make_two_rank_experiment: MakeExperiment,
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    run_until_killed(driver.train_and_die, 2, make_two_rank_experiment(2), str(tmp_path), "before a step", 4)
    damage(tmp_path / "checkpoints/step_00000002")
    with pytest.raises(AssertionError, match=rf"CheckpointError: .*{message}"):
        run_on_ranks(driver.train, 1, make_two_rank_experiment(1), str(tmp_path))
