"""`moe-testbed sync` against a real server, read back through MLflow's own client."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.tracking.mirror import Mirror, SuiteMirror, open_suite
from moe_testbed.launcher.tracking.sync import sync
from tests.tracking import driver
from tests.tracking.folders import append, append_line, make_run, make_suite, write_state
from tests.tracking.reading import names, paths, run_id_of, runs_of, stored, written
from tests.tracking.server import TrackingServer

CHANGING = ("log_artifact", "log_text", "log_batch", "log_inputs", "create_run", "update_run", "set_terminated")


@pytest.fixture
def changes(served: Any, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls that change the store."""
    calls: Counter[str] = Counter()

    def counted(name: str, original: Any) -> Any:
        def count(*arguments: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **options)

        return count

    for name in CHANGING:
        monkeypatch.setattr(type(served), name, counted(name, getattr(type(served), name)))
    return calls


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The store is at a port where nobody listens."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        uri = f"http://somebody:secret@127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        yield uri


def going_on(folder: Path, experiment: str) -> Path:
    """The folder of a training after ten of its thirty steps."""
    run = make_run(folder, tracking={"mlflow": False, "experiment": experiment})
    write_state(run, "running")
    append(run, range(1, 11))
    return run


def test_a_training_of_two_ranks_without_a_network_is_one_run_later(
    make_experiment: Callable[..., dict[str, Any]],
    run_on_ranks: Callable[..., list[Any]],
    tmp_path: Path,
    served: Any,
    server: TrackingServer,
    changes: Counter[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_experiment(tracking={"mlflow": False, "experiment": "offline"}, training={"micro_batch_size": 4})
    run_dir = tmp_path / "run"
    run_on_ranks(driver.train, 2, config, str(run_dir), "http://127.0.0.1:9")
    assert not (run_dir / "mlflow.json").exists()

    assert sync([run_dir]) == 0
    (run,) = runs_of(served, "offline")
    files = len(paths(served, run.info.run_id))
    line = f"{run_dir}: steps 1 to 6, {files} files; MLflow run {run.info.run_id}, finished\n"
    assert capsys.readouterr().out == f"{line}MLflow at {server.uri} has 1 of 1\n"
    assert run.info.status == "FINISHED"
    assert stored(served, run.info.run_id) == written(run_dir)
    assert {key for key, _, _ in written(run_dir)} > {"train/loss", "evaluation/cross_entropy"}
    assert run.data.params["training.steps"] == str(ExperimentConfig.model_validate(config).training.steps)
    assert {"config.yaml", "summary.json", "status.json"} < paths(served, run.info.run_id)

    changes.clear()
    assert sync([run_dir, run_dir]) == 0
    assert changes == {}
    assert f"{run_dir}: nothing new; MLflow run {run.info.run_id}, finished" in capsys.readouterr().out


def test_a_training_that_goes_on_gets_the_rest_later(
    tmp_path: Path, served: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = going_on(tmp_path / "run", "rest")
    assert sync([run_dir]) == 0
    (run,) = runs_of(served, "rest")
    assert run.info.status == "RUNNING"
    assert "steps 1 to 10, 5 files;" in capsys.readouterr().out  # config, summary, status, evaluation, matrix

    append(run_dir, range(11, 21))
    write_state(run_dir, "stopped")
    assert sync([run_dir]) == 0
    assert served.get_run(run.info.run_id).info.status == "KILLED"
    assert "steps 11 to 20, 1 file;" in capsys.readouterr().out

    write_state(run_dir, "running")
    assert sync([run_dir]) == 0
    assert served.get_run(run.info.run_id).info.status == "RUNNING"

    append(run_dir, range(19, 31))  # from the checkpoint of step 18
    write_state(run_dir, "finished")
    assert sync([run_dir]) == 0
    (run,) = runs_of(served, "rest")
    assert run.info.status == "FINISHED"
    assert Counter(key for key in stored(served, run.info.run_id) if key[0] == "train/loss") == {
        ("train/loss", step, 5.0 / step): 1 for step in range(1, 31)
    }


def test_beside_a_training_that_sends_by_itself(tmp_path: Path, served: Any) -> None:
    run_dir = going_on(tmp_path / "run", "beside")
    mirror = Mirror(run_dir, "beside", interval=0.0)
    mirror.start()
    for step in range(11, 41, 10):
        append(run_dir, range(step, step + 10))
        assert sync([run_dir]) == 0
    write_state(run_dir, "finished")
    ended: list[bool] = []
    end = threading.Thread(target=lambda: ended.append(mirror.finish()))
    end.start()
    assert sync([run_dir]) == 0
    end.join()
    assert ended == [True]
    (run,) = runs_of(served, "beside")
    assert stored(served, run.info.run_id) == written(run_dir)


def test_a_suite_is_what_compare_makes_of_it(
    tmp_path: Path, served: Any, server: TrackingServer, changes: Counter[str]
) -> None:
    compared, synced = (
        make_suite(tmp_path / experiment / "demo", tracking={"experiment": experiment})
        for experiment in ("compared", "synced")
    )
    assert SuiteMirror(compared, "compared").finish()
    assert sync([synced]) == 0

    def seen(experiment: str) -> dict[str, Any]:
        runs = {run.info.run_id: run for run in runs_of(served, experiment)}
        own = ("mlflow.parentRunId", "moe_testbed.key", "mlflow.user")
        return {
            run.info.run_name: (
                run.info.status,
                {key: value for key, value in run.data.tags.items() if key not in own},
                runs[parent].info.run_name if (parent := run.data.tags.get("mlflow.parentRunId")) else None,
                {key: value for key, value in run.data.params.items() if key != "tracking.experiment"},
                run.data.metrics,
                stored(served, run.info.run_id),
                paths(served, run.info.run_id),
            )
            for run in runs.values()
        }

    assert len(seen("synced")) == 4
    assert seen("synced") == seen("compared")
    changes.clear()
    assert sync([synced]) == 0
    assert changes == {}


def test_one_run_of_a_suite_comes_with_its_parent(tmp_path: Path, served: Any, server: TrackingServer) -> None:
    suite = make_suite(tmp_path / "demo", tracking={"experiment": "one"})
    assert sync([suite / "top_k-seed1"]) == 0
    runs = runs_of(served, "one")
    assert names(runs) == {"demo", "top_k-seed1"}
    child = next(run for run in runs if run.info.run_name == "top_k-seed1")
    assert child.data.tags["mlflow.parentRunId"] == run_id_of(suite, server.uri)


def test_a_suite_ends_with_its_last_run(tmp_path: Path, served: Any, server: TrackingServer) -> None:
    suite = make_suite(tmp_path / "demo", tracking={"experiment": "last"})
    one, two = suite / "top_k-seed1", suite / "top_k-seed2"
    (one / "status.json").unlink()
    status = lambda: {run.info.run_name: run.info.status for run in runs_of(served, "last")}  # noqa: E731
    ended = {"top_k-seed2": "FINISHED", "top_k_hash-seed1": "FINISHED"}
    assert sync([suite]) == 0
    assert status() == {"demo": "RUNNING", **ended}
    write_state(one, "stopped")
    assert sync([suite]) == 0
    assert status() == {"demo": "RUNNING", "top_k-seed1": "KILLED", **ended}
    write_state(one, "finished")
    assert sync([suite]) == 0
    assert status() == {"demo": "FINISHED", "top_k-seed1": "FINISHED", **ended}
    write_state(two, "failed")
    assert sync([suite]) == 0
    assert status() == {"demo": "FAILED", "top_k-seed1": "FINISHED", **ended, "top_k-seed2": "FAILED"}


def test_trainings_in_an_open_suites_folder_are_its_children_whoever_starts_them(
    tmp_path: Path, served: Any, server: TrackingServer
) -> None:
    suite = tmp_path / "array"
    suite.mkdir()
    (suite / "suite.yaml").write_text("{name: array, seeds: [1], runs: {a: {}, b: {}}}")
    open_suite(suite, "array")
    for name in ("a-seed1", "b-seed1"):
        append(make_run(suite / name), range(1, 4))
        assert Mirror(suite / name, "array").finish()
    append(make_run(tmp_path / "single"), range(1, 4))
    assert Mirror(tmp_path / "single", "array").finish()

    runs = {run.info.run_name: run for run in runs_of(served, "array")}
    parent = run_id_of(suite, server.uri)
    assert runs["array"].info.run_id == parent
    assert runs["array"].data.tags["seeds"] == "1"
    assert {name: run.data.tags.get("mlflow.parentRunId") for name, run in runs.items()} == {
        "array": None, "a-seed1": parent, "b-seed1": parent, "single": None,
    }  # fmt: skip
    assert runs["a-seed1"].data.tags["suite"] == "array"


def test_children_that_were_sent_before_their_suite_find_it(
    tmp_path: Path, served: Any, server: TrackingServer, nowhere: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    suite = make_suite(tmp_path / "demo", tracking={"experiment": "orphans"})
    open_suite(suite, "orphans")
    errors = capsys.readouterr().err
    assert errors.count("MLflow store not reached") == 1 and "secret" not in errors

    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert Mirror(suite / "top_k-seed1", "orphans").finish()
    (orphan,) = runs_of(served, "orphans")
    assert "mlflow.parentRunId" not in orphan.data.tags
    assert sync([suite]) == 0
    parent = run_id_of(suite, server.uri)
    assert served.get_run(orphan.info.run_id).data.tags["mlflow.parentRunId"] == parent
    assert len(runs_of(served, "orphans")) == 4


def test_a_run_that_goes_from_store_to_store_and_back_is_one_in_each(
    tmp_path: Path, served: Any, server: TrackingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    run_dir = going_on(tmp_path / "run", "travel")
    local = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for uri, last in ((local, 11), (server.uri, 16), (local, 21), (server.uri, 31)):
        append(run_dir, range(last, last + 5))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert sync([run_dir]) == 0
    for client, last in ((MlflowClient(local), 25), (served, 35)):
        (run,) = runs_of(client, "travel")
        steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")]
        assert sorted(steps) == [step for step in range(1, last + 1) if not 25 < step < 31]


def test_a_store_that_is_away_is_one_line_and_status_1(
    tmp_path: Path, nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = make_suite(tmp_path / "demo")
    assert main(["sync", str(suite)]) == 1
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.startswith(f"no MLflow store at {nowhere.replace('somebody:secret@', '')}; set MLFLOW_TRACKING_URI")
    assert errors.count("\n") == 1
    assert not (suite / "mlflow.json").exists()


def test_what_the_store_refuses_does_not_hold_up_the_others(
    tmp_path: Path, served: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = going_on(tmp_path / "bad", "refusing"), going_on(tmp_path / "good", "refusing")
    append_line(bad, kind="train", step=99, seconds=9.9, loss=666.0)
    log_batch = type(served).log_batch

    def refuse(client: Any, run_id: str, metrics: Any = (), **options: Any) -> Any:
        if any(metric.value == 666.0 for metric in metrics):
            raise ValueError("no such number")
        return log_batch(client, run_id, metrics=metrics, **options)

    monkeypatch.setattr(type(served), "log_batch", refuse)
    assert sync([bad, good]) == 1
    out, errors = capsys.readouterr()
    assert errors == f"{bad} is not sent: no such number\n"
    assert out.startswith(f"{good}: steps 1 to 10")
    assert out.endswith(" has 1 of 2\n")


def test_folders_that_are_not_there_and_folders_of_something_else(
    tmp_path: Path, nowhere: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = going_on(tmp_path / "run", "missing")
    assert main(["sync", str(run_dir), str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == (
        f"moe-testbed: there is no folder {tmp_path / 'nothing'}; name folders of runs or suites, such as runs/demo\n"
    )
    other = tmp_path / "comparison-a-b"
    other.mkdir()
    assert main(["sync", str(other)]) == 2
    passed_over, refused = capsys.readouterr().err.splitlines()
    assert passed_over == f"{other} is passed over: no suite (suite.yaml), no run that began (status.json)"
    assert refused.startswith("moe-testbed: there is nothing to send")
