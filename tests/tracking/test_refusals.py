"""Stores that take less than this version of MLflow does: other limits, other artifacts, no files. All are real."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import requests

from moe_testbed.launcher.tracking.mirror import Mirror
from moe_testbed.launcher.tracking.names import key_of, plain_key
from moe_testbed.launcher.tracking.sync import sync
from moe_testbed.launcher.tracking.uri import store_uri
from tests.processes.python import run_python
from tests.tracking.folders import append, append_line, make_run
from tests.tracking.reading import paths, run_id_of, runs_of, stored, written

exceptions = pytest.importorskip("mlflow.exceptions")
validation = pytest.importorskip("mlflow.utils.validation")


def the_run(client: Any, folder: Path) -> Any:
    return client.get_run(run_id_of(folder, store_uri()))


@pytest.mark.parametrize("limit", [500, 250])
def test_a_server_of_an_older_version_gets_long_values_cut(
    limit: int, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validation, "MAX_PARAM_VAL_LENGTH", limit)
    monkeypatch.setenv("MLFLOW_TRUNCATE_LONG_VALUES", "false")
    run_dir = make_run(tmp_path / "long", long="x" * 700, longer=["y" * 7000], **{f"k{n}": n for n in range(101)})
    append(run_dir, range(1, 4))
    assert Mirror(run_dir, "older").finish()
    run = the_run(client, run_dir)
    assert run.data.params["long"] == "x" * (limit - 1) + "…"
    assert run.data.params["longer"] == '["' + "y" * (limit - 3) + "…"
    assert run.data.params["k100"] == "100" and len(run.data.params) == 106
    assert run.info.status == "FINISHED"
    assert "config.yaml" in paths(client, run.info.run_id)  # where the values are whole
    assert capsys.readouterr().err == ""


def test_a_key_that_is_refused_holds_up_nothing_else_and_is_told_once(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validation, "MAX_ENTITY_KEY_LENGTH", 40)
    run_dir = make_run(tmp_path / "strict", **{"p" * 60: 1})
    append(run_dir, range(1, 21), **{"m" * 60: 2.0})
    mirror = Mirror(run_dir, "strict")
    assert mirror.push()
    append(run_dir, range(21, 31), **{"m" * 60: 2.0})
    assert mirror.finish()
    run = the_run(client, run_dir)
    whole = {point for point in written(run_dir) if "mmm" not in point[0]}
    assert set(stored(client, run.info.run_id)) == whole and len(whole) == 30
    assert run.data.params["training.steps"] == "30"
    assert run.info.status == "FINISHED"
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{run_dir}: MLflow did not take metric train/{'m' * 60}, parameter {'p' * 60}, which")
    assert "exceeds the maximum length of 40 characters" in told

    assert sync([run_dir]) == 1
    out = capsys.readouterr().out
    assert f"; without metric train/{'m' * 60}, parameter {'p' * 60}\n" in out and out.endswith(" has 0 of 1\n")
    # A store that takes more now gets the parameter at once.
    monkeypatch.setattr(validation, "MAX_ENTITY_KEY_LENGTH", 250)
    assert sync([run_dir]) == 1
    assert the_run(client, run_dir).data.params["p" * 60] == "1"
    assert f"; without metric train/{'m' * 60}\n" in capsys.readouterr().out


def test_a_name_that_is_refused_is_sent_under_a_plainer_one(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a database of Latin letters, which refuses the batch for one other letter."""
    validate = validation._validate_metric_name

    def latin_only(name: str, *arguments: Any) -> None:
        validate(name, *arguments)
        if not name.isascii():
            raise exceptions.MlflowException(f"Incorrect string value: {name}", exceptions.BAD_REQUEST)

    monkeypatch.setattr(validation, "_validate_metric_name", latin_only)
    monkeypatch.setattr(validation, "_validate_param_name", latin_only)
    run_dir = make_run(tmp_path / "latin", 法律=1, 小说=2)
    values = {"cross_entropy": 1.0, "cross_entropy/法律": 2.0, "cross_entropy/小说": 3.0}
    mirror = Mirror(run_dir, "latin")
    for step in range(10, 40, 10):
        append_line(run_dir, kind="evaluation", step=step, seconds=1.0, **values)
        assert mirror.push()
    assert mirror.finish()
    run = the_run(client, run_dir)
    assert sorted(value for key, value in run.data.metrics.items()) == [1.0, 2.0, 3.0]
    assert sum(stored(client, run.info.run_id).values()) == 9
    assert {key: value for key, value in run.data.params.items() if key.startswith("__")} == {
        plain_key("法律"): "1",
        plain_key("小说"): "2",
    }
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"cross_entropy/法律 as {plain_key('evaluation/cross_entropy/法律')}" in told
    assert sync([run_dir]) == 0


def test_a_run_that_is_deleted_while_it_is_sent_loses_nothing(
    tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "sudden")
    append(run_dir, range(1, 11))
    assert Mirror(run_dir, "sudden").push()
    run_id = run_id_of(run_dir, store_uri())
    append(run_dir, range(11, 31))
    log_batch = type(client).log_batch

    def delete_before(self: Any, run_id: str, *arguments: Any, **options: Any) -> Any:
        self.delete_run(run_id)
        return log_batch(self, run_id, *arguments, **options)

    monkeypatch.setattr(type(client), "log_batch", delete_before)
    assert not Mirror(run_dir, "sudden").push()
    assert f"MLflow run {run_id} was deleted" in capsys.readouterr().err
    monkeypatch.setattr(type(client), "log_batch", log_batch)
    client.restore_run(run_id)
    assert Mirror(run_dir, "sudden").finish()
    assert stored(client, run_id) == written(run_dir)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied: '/srv/mlruns'"),
        ModuleNotFoundError("No module named 'boto3'"),
        exceptions.MlflowException("API request failed with exception: too many 500 error responses"),
        403,
    ],
    ids=["folder", "driver", "server", "forbidden"],
)
def test_artifacts_that_are_refused_hold_up_neither_numbers_nor_the_end(
    error: Any, tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if isinstance(error, int):
        response = requests.Response()
        response.status_code = error
        error = requests.HTTPError("403 Client Error: Forbidden", response=response)

    def refuse(*_: object, **__: object) -> None:
        raise error

    run_dir = make_run(tmp_path / "no_files")
    append(run_dir, range(1, 31))
    with monkeypatch.context() as patched:
        for name in ("log_artifact", "log_text"):
            patched.setattr(type(client), name, refuse)
        assert Mirror(run_dir, "artifacts").finish()
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "MLflow did not take file config.yaml, file summary.json" in told
        assert told.rstrip().endswith(str(error))
        assert sync([run_dir]) == 1
    run = the_run(client, run_dir)
    assert stored(client, run.info.run_id) == written(run_dir)
    assert run.info.status == "FINISHED"
    assert sync([run_dir]) == 0
    assert "5 files" in capsys.readouterr().out
    assert "config.yaml" in paths(client, run.info.run_id)


def test_domains_in_any_script_are_metrics_of_their_own(tmp_path: Path, client: Any) -> None:
    domains = [
        "法律",
        "小说",
        "право",
        "проза",
        "νόμος",
        "λόγος",
        "हिन्दी",
        "हिन्दू",
        "law & order",
        "law | order",
        "Law",
        "law",
        "a//b",
    ]
    run_dir = make_run(tmp_path / "判決", data={"mix": {"domains": {name: {"weight": 1} for name in domains}}})
    values = {f"cross_entropy/{name}": float(number) for number, name in enumerate(domains)}
    append_line(run_dir, kind="evaluation", step=30, seconds=3.0, cross_entropy=1.5, **values)
    assert Mirror(run_dir, "scripts").finish()
    run = the_run(client, run_dir)
    metrics = {key: value for key, value in run.data.metrics.items() if key.startswith("evaluation/cross_entropy/")}
    assert sorted(metrics.values()) == [float(number) for number in range(len(domains))]
    for number, name in enumerate(domains[:6]):
        assert metrics[f"evaluation/cross_entropy/{name}"] == number
    assert len([key for key in run.data.params if key.startswith("data.mix.domains.")]) == len(domains)
    assert run.info.run_name == "判決"


def test_a_store_of_files_is_told_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    run_dir = make_run(tmp_path / "filed")
    append(run_dir, range(1, 4))
    assert not Mirror(run_dir, "files").finish()
    assert sync([run_dir]) == 1
    training, synced = capsys.readouterr().err.splitlines()
    assert training.startswith(
        f"{run_dir}: MLflow no longer opens stores made of files, such as file://{tmp_path}/mlruns"
    )
    assert "MLFLOW_ALLOW_FILE_STORE=true" in training and "sqlite:///mlflow.db" in training
    assert synced.startswith("nothing is sent: MLflow no longer opens")
    assert not (run_dir / "mlflow.json").exists()


def test_a_store_of_files_that_is_allowed_has_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/with space/mlruns")
    run_dir = make_run(tmp_path / "filed", weights={"law": 1, "law/eu": 2})
    append(run_dir, range(1, 31))
    names = ["cross_entropy", "cross_entropy/law", "cross_entropy/law/eu", "cross_entropy/" + "法" * 100]
    append_line(run_dir, kind="evaluation", step=30, seconds=3.0, **{name: 1.0 + len(name) for name in names})
    mirror = Mirror(run_dir, "files")
    assert mirror.push()
    append(run_dir, range(31, 41))
    assert mirror.finish()
    assert capsys.readouterr().err == ""
    client = MlflowClient(store_uri())
    (run,) = runs_of(client, "files")
    assert sum(stored(client, run.info.run_id).values()) == sum(written(run_dir).values()) == 44
    for name in names:
        assert run.data.metrics[key_of(f"evaluation/{name}", slashes=1)] == 1.0 + len(name)
    assert (run.data.params["weights.law"], run.data.params[key_of("weights.law/eu", slashes=0)]) == ("1", "2")
    assert run.info.status == "FINISHED"
    assert sync([run_dir]) == 0
    assert "nothing new" in capsys.readouterr().out


def test_a_database_of_another_version_is_told_with_what_helps_and_gets_everything_later(
    tmp_path: Path, client: Any, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "run")
    append(run_dir, range(1, 4))
    assert Mirror(run_dir, "upgraded").push()
    run_id = run_id_of(run_dir, store)
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (version,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    append(run_dir, range(4, 31))
    assert not Mirror(run_dir, "upgraded").finish()
    told = capsys.readouterr().err
    assert told.startswith(f"{run_dir}: MLflow at sqlite:///{tmp_path}/mlflow.db refuses") and told.count("\n") == 1
    assert "mlflow db upgrade" in told

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    assert sync([run_dir]) == 0
    from mlflow.tracking import MlflowClient

    assert run_id_of(run_dir, store_uri()) == run_id
    assert stored(MlflowClient(store_uri()), run_id) == written(run_dir)


@pytest.mark.slow
def test_a_database_that_another_program_left_half_made_is_told_with_what_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with sqlite3.connect(database) as connection:
        # What is left of the change of a table that was killed (findings/mlflow_killed_creation.sh).
        connection.execute("CREATE TABLE _alembic_tmp_experiments (experiment_id INTEGER)")
    run_dir = make_run(tmp_path / "run")
    append(run_dir, range(1, 4))
    assert sync([run_dir]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"nothing is sent: the tables of MLflow's database sqlite:///{database} are half made")
    assert "move the file away and run `moe-testbed sync FOLDER`" in told and told.count("\n") == 1
    database.rename(tmp_path / "moved.db")
    # In another process, since MLflow keeps its connections to the file that was moved.
    done = run_python("-m", "moe_testbed.launcher", "sync", str(run_dir))
    assert done.returncode == 0, done.stderr
