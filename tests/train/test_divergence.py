"""A training that diverges ends in that step, says where it began, and keeps its last healthy checkpoint."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.config.experiment import TrainingConfig
from moe_testbed.launcher.train.divergence.watch import advice
from tests.train import driver, faults
from tests.train.results import assert_same_run, read_metrics

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]
Faulty = Callable[..., str]

TRIES = "train with a training.learning_rate below 0.01, in another folder"


@pytest.fixture(scope="module")
def config(make_experiment: MakeExperiment) -> dict[str, Any]:
    return make_experiment(checkpoint={"every": 1})


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], run_on_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run without a fault."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(driver.train, 1, config, str(run_dir))
    return run_dir


def losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(run_dir) if line["kind"] == "train"]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))


def status(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize(
    ("fault", "name", "words", "kept"),
    [
        # The checkpoint of step 3 is not known to be healthy when the loss of step 4 is not finite.
        (
            "weight",
            "blocks.0.attention.query_key_value.weight",
            "at step 4: .* are not finite; it began in blocks.0.attention.query_key_value.weight, a weight",
            ["step_00000002"],
        ),
        (
            "weight",
            "blocks.1.routing.router.scorer.weight",
            "at step 4: .* are not finite; it began in blocks.1.routing.router.scorer.weight, a weight",
            ["step_00000002"],
        ),
        (
            "gradient",
            "blocks.1.feed_forward_norm.weight",
            "at step 4: the gradient is not finite, the loss .*; it began in the gradient of "
            "blocks.1.feed_forward_norm.weight",
            ["step_00000002", "step_00000003"],
        ),
        (
            "update",
            "blocks.0.moe.deepspeed_moe.experts.down",
            "in the update of step 4: weights are not finite; it began in blocks.0.moe.deepspeed_moe.experts.down, a",
            ["step_00000003"],
        ),
    ],
)
def test_it_ends_in_the_step_and_the_same_command_continues_from_before_it(
    fault: str,
    name: str,
    words: str,
    kept: list[str],
    config: dict[str, Any],
    whole: Path,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    """Without the fault, as after one of the machine, it comes to the same end as if there had never been one."""
    run_dir = tmp_path / "run"
    (told,) = run_on_ranks(faults.train, 1, config, str(run_dir), fault, name, [4])
    assert re.match(f"diverged {words}", told), told
    assert told.endswith(f"; {TRIES}")
    assert status(run_dir) == {"state": "diverged", "step": 4, "steps": 6, "reason": told}
    assert len(losses(run_dir)) == 4 and all(map(math.isfinite, losses(run_dir)[:3]))
    assert checkpoints(run_dir) == kept
    run_on_ranks(driver.train, 1, config, str(run_dir))
    assert status(run_dir)["state"] == "finished"
    assert_same_run(run_dir, whole)


@pytest.mark.parametrize(
    "training",
    [
        {"zero_stage": 0, "gradient_clipping": 0.0},
        {"zero_stage": 2},
        {"precision": "bfloat16"},
        {"precision": "bfloat16", "zero_stage": 2},
    ],
    ids=str,
)
def test_a_gradient_that_is_not_finite_changes_no_weight_whatever_holds_it(
    training: dict[str, Any], make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """The dense baseline, which has no router that would notice."""
    config = make_experiment(
        training=training | {"steps": 3},
        model=make_experiment()["model"] | {"dense_baseline": True},
        routing={"balance": {}, "router": {"name": "hash"}},
    )
    name = "blocks.0.dense.down.weight"
    (told,) = run_on_ranks(faults.train, 1, config, str(tmp_path / "run"), "gradient", name, [2])
    assert f"; it began in the gradient of {name}; train with " in told
    norms = [line["gradient_norm"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [math.isfinite(norm) for norm in norms] == [True, False]


def test_steps_are_skipped_as_often_as_is_allowed_also_after_a_restart(
    config: dict[str, Any], run_on_ranks: Run, tmp_path: Path
) -> None:
    allowed = config | {"training": config["training"] | {"max_skipped_steps": 1}}
    for told_before in (False, True):
        # The second time it continues after step 4, when one step has been skipped.
        (told,) = run_on_ranks(
            faults.train,
            1,
            allowed,
            str(tmp_path / "run"),
            "gradient",
            "final_norm.weight",
            [5] if told_before else [3, 5],
        )
        assert told.startswith("diverged at step 5: the gradient is not finite, the loss ")
        lines = [line for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
        assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 2]
        assert all(math.isfinite(line["loss"]) for line in lines)


def test_an_evaluation_that_is_not_finite_ends_the_training(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """Weights have become huge in the last update: no step follows that would tell."""
    for router, words in {
        "hash": "cross_entropy is not finite; it began in blocks.0.attention.output, which returned ",
        "top_k": "router 'top_k' in MoE layer 0 at step 3 returned ",
    }.items():
        config = make_experiment(routing={"router": {"name": router}, "balance": {}}, evaluation={"every": 3})
        run_dir = tmp_path / router
        name = "blocks.0.attention.output.weight"
        (told,) = run_on_ranks(faults.train, 1, config, str(run_dir), "huge update", name, [3])
        assert told.startswith(f"diverged in the evaluation after step 3: {words}")
        assert status(run_dir)["state"] == "diverged" and checkpoints(run_dir) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "training.learning_rate below 0.5 or training.warmup_steps 4"),
        (
            {"warmup_steps": 4, "gradient_clipping": 0.0, "precision": "bfloat16"},
            "training.learning_rate below 0.5, training.gradient_clipping 1 or training.precision float32",
        ),
    ],
)
def test_the_advice_is_what_is_not_done_yet(options: dict[str, Any], words: str) -> None:
    usual = {"steps": 40, "global_batch_size": 8, "micro_batch_size": 8, "learning_rate": 0.5}
    found = advice(TrainingConfig.model_validate(usual | options))
    assert found == f"train with a {words}, in another folder"
