"""Against a real server, through its own client: suites, parameters, metrics, artifacts, and its death."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config
from moe_testbed.launcher.tracking import mirror
from moe_testbed.launcher.tracking.mirror import Mirror, SuiteMirror
from moe_testbed.launcher.tracking.state import read_ledger
from tests.tracking import driver
from tests.tracking.folders import SYSTEM, append, make_run, make_suite
from tests.tracking.reading import names, paths, run_id_of, runs_of, stored, written
from tests.tracking.server import TrackingServer


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_suite_is_a_parent_with_children_that_can_be_searched(
    tmp_path: Path, served: Any, server: TrackingServer
) -> None:
    suite = make_suite(tmp_path / "demo")
    assert SuiteMirror(suite, "suite").finish()
    parent = run_id_of(suite, server.uri)
    children = runs_of(served, "suite", f"tags.mlflow.parentRunId = '{parent}'")
    assert names(children) == {"top_k-seed1", "top_k-seed2", "top_k_hash-seed1"}
    assert len(runs_of(served, "suite")) == 4
    assert {run.info.status for run in runs_of(served, "suite")} == {"FINISHED"}

    for search, found in {
        "params.`routing.router.name` = 'hash'": {"top_k_hash-seed1"},
        "params.`routing.balance.load_balancing_loss.scope` = 'sequence' and tags.seed = '2'": {"top_k-seed2"},
        "tags.router = 'top_k' and tags.suite = 'demo'": {"top_k-seed1", "top_k-seed2"},
        "tags.role = 'control'": {"top_k_hash-seed1"},
        "metrics.`result/recovered` > 0.5": {"top_k-seed1", "top_k-seed2"},
        "dataset.name = 'two'": {"top_k-seed1", "top_k-seed2", "top_k_hash-seed1"},
    }.items():
        assert names(runs_of(served, "suite", search)) == found, search
    by_loss = runs_of(served, "suite", order_by=["metrics.`result/loss` DESC"])
    assert by_loss[0].info.run_name == "top_k_hash-seed1"

    for run in children:
        folder = suite / run.info.run_name
        assert stored(served, run.info.run_id) == written(folder)
        system = {key: value for key, value in run.data.metrics.items() if key.startswith("system/")}
        assert system == {f"system/{key}": value for key, value in SYSTEM.items()}
        (dataset,) = run.inputs.dataset_inputs
        assert json.loads(dataset.dataset.profile) == {"training tokens": {"law": 700, "music": 300}}
    assert {"report.html", "results.json", "figures/scatter.svg", "tables/runs.tex"} <= paths(served, parent)
    one = next(run.info.run_id for run in children if run.info.run_name == "top_k_hash-seed1")
    assert {path for path in paths(served, one) if path.startswith(("figures", "statistics", "analysis"))} == {
        "figures/routing_top_k_hash.svg",
        "statistics/step_00000030.npz",
        "analysis.npz",
    }


def test_runs_are_sorted_by_what_they_and_what_they_start_from_have_taken(
    tmp_path: Path, served: Any, server: TrackingServer
) -> None:
    suite = make_suite(tmp_path / "costs")
    for label, own, inherited in (("top_k-seed1", 300, 0), ("top_k-seed2", 100, 250), ("top_k_hash-seed1", 200, 50)):
        ledger = {"flops": own, "flops_by_part": {"encoder": own}, "layer_units": own / 10}
        ledger |= {"inherited_flops": inherited, "inherited_layer_units": inherited / 10}
        (suite / label / "summary.json").write_text(json.dumps({"ledger": ledger}))
    assert SuiteMirror(suite, "costs").finish()
    parent = run_id_of(suite, server.uri)

    def sorted_by(key: str) -> list[str]:
        found = runs_of(served, "costs", f"tags.mlflow.parentRunId = '{parent}'", order_by=[f"metrics.`{key}`"])
        return [run.info.run_name for run in found]

    assert sorted_by("ledger/flops") == ["top_k-seed2", "top_k_hash-seed1", "top_k-seed1"]
    assert sorted_by("ledger/flops_with_inherited") == ["top_k_hash-seed1", "top_k-seed1", "top_k-seed2"]
    one = next(run for run in runs_of(served, "costs") if run.info.run_name == "top_k-seed2")
    assert one.data.metrics["ledger/layer_units_with_inherited"] == 35.0


def test_a_suite_is_told_again_only_of_what_changed(
    tmp_path: Path, served: Any, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = make_suite(tmp_path / "again")
    assert SuiteMirror(suite, "again").finish()
    calls: Counter[str] = Counter()
    for name in ("log_artifact", "log_text", "log_batch", "log_inputs", "create_run"):
        original = getattr(type(served), name)

        def count(*arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(type(served), name, count)
    assert SuiteMirror(suite, "again").finish()
    assert calls == {}

    results = json.loads((suite / "results.json").read_text())
    results["runs"][0]["recovered"]["value"] = 0.8
    (suite / "results.json").write_text(json.dumps(results))
    assert SuiteMirror(suite, "again").finish()
    assert calls == {"log_batch": 2, "log_artifact": 1}
    changed = runs_of(served, "again", "metrics.`result/recovered` = 0.8")
    assert names(changed) == {"top_k-seed1", "top_k-seed2"}


def test_a_run_of_a_suite_ends_when_it_ends(tmp_path: Path, served: Any, server: TrackingServer) -> None:
    suite = make_suite(tmp_path / "early")
    (suite / "top_k-seed1" / "status.json").write_text('{"state": "running"}')
    mirror = SuiteMirror(suite, "early")
    assert mirror.push()
    status = {run.info.run_name: run.info.status for run in runs_of(served, "early")}
    assert status == {
        "early": "RUNNING", "top_k-seed1": "RUNNING", "top_k-seed2": "FINISHED", "top_k_hash-seed1": "FINISHED",
    }  # fmt: skip


@pytest.mark.slow
def test_a_server_that_dies_in_mid_training_gets_everything_once_it_is_back(
    tmp_path: Path, server: TrackingServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    own = TrackingServer(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", own.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_dir = make_run(tmp_path / "cut_off")
    mirror = Mirror(run_dir, "mortal", interval=0.01)
    sent = lambda: read_ledger(run_dir, own.uri).steps.get("train", 0)  # noqa: E731
    tries: list[bool] = []
    push = mirror.push
    monkeypatch.setattr(mirror, "push", lambda: tries.append(push()))
    try:
        own.start()
        mirror.start()
        append(run_dir, range(1, 11))
        wait_until(lambda: sent() == 10)
        own.kill()
        append(run_dir, range(11, 21))
        failed = lambda: tries.count(False)  # noqa: E731
        wait_until(lambda: failed() >= 2)
        assert sent() == 10
        own.start()
        append(run_dir, range(21, 31))
        assert mirror.finish()
        client = MlflowClient(own.uri)
        (run,) = runs_of(client, "mortal")
        assert stored(client, run.info.run_id) == written(run_dir)
        assert run.info.status == "FINISHED"
    finally:
        own.kill()
    assert capsys.readouterr().err.count("MLflow store not reached") == 1


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that accepts connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        yield


def test_a_server_that_never_answers_is_given_up(
    tmp_path: Path, silent: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "unheard")
    append(run_dir, range(1, 4))
    mirror = Mirror(run_dir, "silence", interval=0.0)
    mirror.start()
    assert not mirror.finish()
    assert not SuiteMirror(make_suite(tmp_path / "suite"), "silence").finish()
    errors = capsys.readouterr().err
    assert "timed out" in errors
    assert errors.count(f"is in {run_dir} ") == 1
    assert errors.count(f"is in {tmp_path / 'suite'} ") == 1


def test_the_end_of_a_training_waits_for_nothing_longer_than_its_bound(
    tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "600")
    monkeypatch.setattr(mirror, "FINISH_SECONDS", 0.2)
    run_dir = make_run(tmp_path / "endless")
    assert not Mirror(run_dir, "silence").finish()
    assert "no end within 0.2 seconds" in capsys.readouterr().err


TWO_RANKS = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 4, "learning_rate": 0.01}


@pytest.mark.slow
def test_a_training_killed_on_two_ranks_is_one_run_when_it_has_continued(
    make_experiment: Callable[..., dict[str, Any]],
    run_on_ranks: Callable[..., list[Any]],
    run_until_killed: Callable[..., None],
    tmp_path: Path,
    served: Any,
    server: TrackingServer,
) -> None:
    tracked = {"mlflow": True, "experiment": "ranks"}
    config = make_experiment(tracking=tracked, training=TWO_RANKS, checkpoint={"every": 2})
    run_dir = tmp_path / "run"
    run_until_killed(driver.train_and_die, 2, config, str(run_dir), server.uri, 3)
    (first,) = runs_of(served, "ranks")
    assert first.info.status == "RUNNING"
    run_on_ranks(driver.train, 2, config, str(run_dir), server.uri)
    (run,) = runs_of(served, "ranks")
    assert (run.info.run_id, run.info.status) == (first.info.run_id, "FINISHED")
    # The step after the checkpoint was computed twice; its losses are the same, its times are not.
    assert {key for key in stored(served, run.info.run_id) if key[0] == "train/loss"} == {
        key for key in written(run_dir) if key[0] == "train/loss"
    }
    assert max(stored(served, run.info.run_id).values()) == 1
    assert run.data.params["training.steps"] == "6"


def test_a_training_beside_a_store_that_is_stuck_comes_to_its_end(
    make_experiment: Callable[..., dict[str, Any]],
    run_on_ranks: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    config = make_experiment(tracking={"mlflow": True})
    run_on_ranks(driver.train_without_an_answer, 1, config, str(tmp_path / "run"), "http://127.0.0.1:9")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    steps = [step for key, step, _ in written(tmp_path / "run") if key == "train/loss"]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_suite_that_is_trained_by_the_command(
    make_experiment: Callable[..., dict[str, Any]], tmp_path: Path, served: Any, server: TrackingServer
) -> None:
    content = make_experiment(tracking={"mlflow": True, "experiment": "command"})
    (tmp_path / "experiment.yaml").write_text(dump_config(ExperimentConfig.model_validate(content)), encoding="utf-8")
    suite = {"name": "pair", "experiment": "experiment.yaml", "reference": ["learned"], "control": "fixed"}
    suite |= {
        "runs": {"learned": {}, "fixed": {"overrides": {"routing": {"router": {"name": "hash"}, "balance": "none"}}}}
    }
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    command = [sys.executable, "-m", "moe_testbed.launcher", "compare", "pair.yaml"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]

    parent = run_id_of(tmp_path / "runs" / "pair", server.uri)
    children = runs_of(served, "command", f"tags.mlflow.parentRunId = '{parent}'")
    assert names(children) == {"learned-seed1", "fixed-seed1"}
    assert "report.html" in paths(served, parent)
    assert "learned" in served.get_run(parent).data.tags["mlflow.note.content"]
    for run in children:
        tags, folder = run.data.tags, tmp_path / "runs" / "pair" / run.info.run_name
        assert (tags["role"], tags["router"]) in {("reference", "top_k"), ("control", "hash")}
        assert tags["mlflow.note.content"].startswith(f"**{tags['label']}** is the ")
        assert stored(served, run.info.run_id) == written(folder)
        loss = run.data.metrics["result/loss"]
        assert loss == pytest.approx(run.data.metrics["evaluation/cross_entropy"], rel=1e-8)
        assert f"figures/routing_{tags['label']}.png" in paths(served, run.info.run_id)
        assert {path.name for path in (folder / "statistics").iterdir()} == {
            path.removeprefix("statistics/")
            for path in paths(served, run.info.run_id)
            if path.startswith("statistics/")
        }
