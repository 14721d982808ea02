"""Routers from outside in a training: they train, and one that goes wrong ends it on every rank with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.config.experiment import load_experiment
from tests.cli import cli_driver
from tests.distributed.conftest import data, make_experiment, run_on_ranks

__all__ = ["data", "make_experiment", "run_on_ranks"]

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]
Write = Callable[[str, str], Path]

EXAMPLE = Path(__file__).parents[2] / "configs" / "examples" / "nearest_vector.py"
# Returns NaN in the third step, on the rank that it was told.
FAILING = """
    import os

    from moe_testbed.routing.routers.top_k import TopK

    class Failing(TopK):
        def weigh(self, scores, expert_ids_TK):
            weights_TK = super().weigh(scores, expert_ids_TK)
            return weights_TK * float("nan") if self.fails else weights_TK

        def forward(self, x_TM, context):
            self.fails = self.training and context.step == 2 and os.environ["RANK"] in "RANKS"
            return super().forward(x_TM, context)
"""
REASON = (
    "diverged at step 3: loss, cross_entropy, balance/load_balancing_loss are not finite; it began in "
    "blocks.0.routing.router, which returned 128 NaN or infinite weights_TK of 128 (in a router of your own, look for "
    "a division by zero); train with a training.learning_rate below 0.01, in another folder"
)


@pytest.fixture
def train(make_experiment: MakeExperiment, run_on_ranks: Run, write: Write, tmp_path: Path) -> Callable[..., Any]:
    """Trains with a router by the command line in a fresh working directory: (status, stderr) of each rank."""

    def train(router: dict[str, Any], num_ranks: int = 1, entry_points: dict[str, str] | None = None) -> Any:
        routing = {"router": router, "balance": {"load_balancing_loss": {}}}
        content = make_experiment(
            routing=routing, training={"micro_batch_size": 4, "steps": 4}, evaluation={"every": 2}
        )
        write("experiment.yaml", yaml.safe_dump(content, sort_keys=False))
        arguments = ["train", "experiment.yaml", "--run-dir", "run"]
        return run_on_ranks(cli_driver.run_cli, num_ranks, str(tmp_path), arguments, entry_points or {})

    return train


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("form", ["file", "module", "entry point", "in the package"])
def test_the_example_trains(form: str, train: Callable[..., Any], write: Write, tmp_path: Path) -> None:
    name = {
        "file": "mine/nearest.py:NearestVector",
        "module": "mine.nearest:NearestVector",
        "entry point": "nearest_vector",
        "in the package": "moe_testbed.configs.examples.nearest_vector:NearestVector",
    }[form]
    write("mine/__init__.py", "")
    shutil.copy(EXAMPLE, tmp_path / "mine" / "nearest.py")
    installed = {"nearest_vector": "moe_testbed.configs.examples.nearest_vector:NearestVector"}
    ((status, errors),) = train({"name": name, "sharpness": 4.0}, entry_points=installed)
    assert status == 0, errors
    assert f"router {name}, " in errors
    assert read_json(tmp_path / "run" / "status.json")["state"] == "finished"
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert written["routing"]["router"] == {"name": name, "sharpness": 4.0}
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4]


def test_the_example_s_experiment_is_whole() -> None:
    config = load_experiment("configs/examples/nearest_vector.yaml")
    assert config.routing.router.model_dump()["sharpness"] == 4.0


@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_a_router_that_goes_wrong_ends_all_ranks_with_its_reason(
    failing: str, train: Callable[..., Any], write: Write, tmp_path: Path
) -> None:
    write("failing.py", FAILING.replace("RANKS", failing))
    for rank, (status, errors) in enumerate(train({"name": "failing.py:Failing"}, num_ranks=2)):
        assert status == 2, rank
        assert errors.splitlines()[-1] == f"moe-testbed: {REASON}"
        assert "Traceback" not in errors
    status = read_json(tmp_path / "run" / "status.json")
    assert status == {"state": "diverged", "step": 3, "steps": 4, "reason": REASON}


def test_a_router_that_cannot_be_had_is_said_before_training(train: Callable[..., Any], tmp_path: Path) -> None:
    ((status, errors),) = train({"name": "nowhere.py:Mine"})
    assert status == 2
    assert errors.count("\n") == 1
    assert errors.startswith("moe-testbed: experiment.yaml:")
    assert "routing.router: the router 'nowhere.py:Mine': there is no file" in errors
    assert not (tmp_path / "run").exists()
