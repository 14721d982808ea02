"""Runs and experiments that were deleted, restored, renamed or moved, in real stores: SQLite and files."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.tracking.mirror import Mirror, SuiteMirror
from moe_testbed.launcher.tracking.state import read_ledger
from moe_testbed.launcher.tracking.sync import sync
from moe_testbed.launcher.tracking.uri import store_uri
from tests.tracking.folders import append, make_run, write_state
from tests.tracking.reading import paths, run_id_of, runs_of, stored, written

pytest.importorskip("mlflow")


@pytest.fixture(params=["database", "files"])
def any_client(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of each kind of store."""
    if request.param == "database":
        return request.getfixturevalue("client")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    return MlflowClient(store_uri())


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    """A training after ten of its thirty steps; its experiment is named like the test's folder."""
    folder = make_run(tmp_path / "run", tracking={"experiment": tmp_path.name})
    write_state(folder, "running")
    append(folder, range(1, 11))
    yield folder


def go_on(folder: Path, last: int = 31) -> None:
    append(folder, range(11, last))
    write_state(folder, "finished")


def small_suite(folder: Path, experiment: str) -> Path:
    """Two finished runs of three steps."""
    for name in ("a-seed1", "b-seed1"):
        append(make_run(folder / name, tracking={"experiment": experiment}), range(1, 4))
    (folder / "suite.yaml").write_text(f"{{name: {folder.name}, seeds: [1], runs: {{a: {{}}, b: {{}}}}}}")
    return folder


def command_in(told: str, start: str) -> list[str]:
    """The words of the command in a message that begins so."""
    words = told[told.index(start) :].split(")")[0].split("`")[0]
    return shlex.split(words)


def everything_is_there(client: Any, run_id: str, folder: Path) -> None:
    run = client.get_run(run_id)
    assert (run.info.lifecycle_stage, run.info.status) == ("active", "FINISHED")
    assert stored(client, run_id) == written(folder)
    assert run.data.params["training.steps"] == "30"
    assert {"config.yaml", "summary.json", "status.json"} < paths(client, run_id)


def test_a_deleted_run_is_told_with_its_cure_and_goes_on_when_it_is_restored(
    run_dir: Path, any_client: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(run_dir, run_dir.parent.name)
    assert mirror.push()
    run_id = run_id_of(run_dir, store_uri())
    any_client.delete_run(run_id)
    append(run_dir, range(11, 16))
    assert not mirror.push()
    assert not mirror.push()
    append(run_dir, range(16, 21))
    assert not mirror.push()
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"{run_dir}: MLflow run {run_id} was deleted") and "not reached" not in told

    # As it stands in the message.
    variable, *command = command_in(told, "MLFLOW_TRACKING_URI=")
    assert command == ["mlflow", "runs", "restore", "--run-id", run_id]
    from click.testing import CliRunner
    from mlflow.runs import commands

    monkeypatch.setenv(*variable.split("=", 1))
    assert CliRunner().invoke(commands, command[2:]).exit_code == 0
    append(run_dir, range(21, 31))
    write_state(run_dir, "finished")
    assert mirror.finish()
    everything_is_there(any_client, run_id, run_dir)
    assert capsys.readouterr().err == ""


def test_sync_never_says_that_a_deleted_run_is_there_and_makes_a_new_one_if_it_shall(
    run_dir: Path, any_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync([run_dir]) == 0
    old = run_id_of(run_dir, store_uri())
    any_client.delete_run(old)
    capsys.readouterr()
    assert main(["sync", str(run_dir)]) == 1  # nothing is new, and yet it is not there
    out, told = capsys.readouterr()
    assert out.endswith(" has 0 of 1\n")
    assert told.startswith(f"{run_dir} is not sent: MLflow run {old} was deleted")

    go_on(run_dir)
    command = command_in(told, "moe-testbed sync --new-runs")
    assert main(command[1:]) == 0
    new = run_id_of(run_dir, store_uri())
    assert new != old
    everything_is_there(any_client, new, run_dir)
    assert any_client.get_run(new).data.tags["replaces_run"] == old
    assert f"steps 1 to 30, 5 files; MLflow run {new}, finished" in capsys.readouterr().out
    # It is no other now that the option is given again, or the old one is back.
    any_client.restore_run(old)
    assert sync([run_dir], new_runs=True) == 0
    assert run_id_of(run_dir, store_uri()) == new
    assert len(runs_of(any_client, run_dir.parent.name)) == 2


def test_a_deleted_run_whose_number_was_lost_is_not_made_again_unasked(run_dir: Path, client: Any) -> None:
    assert sync([run_dir]) == 0
    run_id = run_id_of(run_dir, store_uri())
    client.delete_run(run_id)
    ledger = run_dir / "mlflow.json"
    ledger.write_text(ledger.read_text().replace(f'"{run_id}"', "null"))
    assert sync([run_dir]) == 1
    client.restore_run(run_id)
    go_on(run_dir)
    assert sync([run_dir]) == 0
    everything_is_there(client, run_id, run_dir)


@pytest.mark.parametrize("begun", [True, False])
def test_a_deleted_experiment_is_told_with_its_cure(
    begun: bool, run_dir: Path, any_client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = run_dir.parent.name
    if begun:
        assert sync([run_dir]) == 0
        number = any_client.get_experiment_by_name(experiment).experiment_id
    else:
        number = any_client.create_experiment(experiment)
    any_client.delete_experiment(number)
    go_on(run_dir)
    capsys.readouterr()
    assert not Mirror(run_dir, experiment).finish()
    told = capsys.readouterr().err
    assert told.startswith(f"{run_dir}: MLflow experiment '{experiment}' was deleted") and told.count("\n") == 1
    assert command_in(told, "MLFLOW_TRACKING_URI=")[1:] == [
        "mlflow", "experiments", "restore", "--experiment-id", number,
    ]  # fmt: skip
    assert sync([run_dir]) == 1
    assert capsys.readouterr().out.endswith(" has 0 of 1\n")

    any_client.restore_experiment(number)
    assert sync([run_dir]) == 0
    everything_is_there(any_client, run_id_of(run_dir, store_uri()), run_dir)
    assert len(runs_of(any_client, experiment)) == 1


def test_another_experiment_takes_what_a_deleted_one_does_not(
    tmp_path: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = small_suite(tmp_path / "demo", "thrown away")
    assert sync([suite]) == 0
    client.delete_experiment(client.get_experiment_by_name("thrown away").experiment_id)
    assert sync([suite]) == 1
    assert sync([suite], new_runs=True) == 1
    assert capsys.readouterr().out.endswith(" has 0 of 3\n")

    assert sync([suite], True, "kept") == 0
    runs = runs_of(client, "kept")
    parent = run_id_of(suite, store_uri())
    assert {run.data.tags.get("mlflow.parentRunId") for run in runs} == {None, parent}
    assert len(runs) == 3
    for run in runs:
        assert "replaces_run" in run.data.tags
        if run.info.run_id != parent:
            assert stored(client, run.info.run_id) == written(suite / run.info.run_name)
    # From now on without the options.
    assert sync([suite]) == 0
    assert capsys.readouterr().out.endswith(" has 3 of 3\n")


def test_a_run_restored_alone_in_a_deleted_experiment_is_not_there(
    run_dir: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sync([run_dir]) == 0
    run_id = run_id_of(run_dir, store_uri())
    client.delete_experiment(client.get_run(run_id).info.experiment_id)
    client.restore_run(run_id)
    capsys.readouterr()
    assert sync([run_dir]) == 1
    assert "MLflow experiment" in capsys.readouterr().err
    go_on(run_dir)
    assert sync([run_dir], True, "seen again") == 0
    (run,) = runs_of(client, "seen again")
    everything_is_there(client, run.info.run_id, run_dir)


def test_runs_stay_where_they_are_when_their_experiment_is_renamed(tmp_path: Path, client: Any) -> None:
    suite = small_suite(tmp_path / "demo", "old name")
    late = suite / "b-seed1"
    (late / "status.json").rename(late / "hidden")
    assert sync([suite]) == 0
    client.rename_experiment(client.get_experiment_by_name("old name").experiment_id, "new name")
    (late / "hidden").rename(late / "status.json")
    append(suite / "a-seed1", range(4, 7))
    assert sync([suite]) == 0
    assert client.get_experiment_by_name("old name") is None
    runs = {run.info.run_name: run for run in runs_of(client, "new name")}
    assert set(runs) == {"demo", "a-seed1", "b-seed1"}
    for name in ("a-seed1", "b-seed1"):
        assert stored(client, runs[name].info.run_id) == written(suite / name)


def test_one_deleted_run_of_a_suite_holds_up_no_other(
    tmp_path: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = small_suite(tmp_path / "demo", "one of two")
    first, other = sorted(suite.glob("*-seed*"))
    for folder in (first, other):
        write_state(folder, "running")
    mirror = SuiteMirror(suite, "one of two")
    assert mirror.push()
    client.delete_run(run_id_of(first, store_uri()))
    for folder in (first, other):
        append(folder, range(4, 7))
        write_state(folder, "finished")
    assert not mirror.push()
    assert not mirror.finish()
    told = [line for line in capsys.readouterr().err.splitlines() if "MLflow" in line]
    assert len(told) == 1 and f"sync --new-runs {first}`" in told[0]
    everything_is_there(client, run_id_of(other, store_uri()), other)
    parent = client.get_run(run_id_of(suite, store_uri()))
    assert parent.info.status == "FINISHED"


def test_a_suite_whose_own_run_was_deleted_goes_on_with_its_runs(
    tmp_path: Path, client: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = small_suite(tmp_path / "demo", "no parent")
    assert SuiteMirror(suite, "no parent").push()
    parent = run_id_of(suite, store_uri())
    client.delete_run(parent)
    append(suite / "a-seed1", range(4, 7))
    assert not SuiteMirror(suite, "no parent").finish()
    assert capsys.readouterr().err.count(f"MLflow run {parent} was deleted") == 1
    run_dir = suite / "a-seed1"
    assert stored(client, run_id_of(run_dir, store_uri())) == written(run_dir)

    assert sync([suite], new_runs=True) == 0
    new = run_id_of(suite, store_uri())
    children = runs_of(client, "no parent", f"tags.mlflow.parentRunId = '{new}'")
    assert new != parent and len(children) == 2


def test_two_suites_of_one_name_are_two_runs(tmp_path: Path, client: Any) -> None:
    suites = [small_suite(tmp_path / name / "demo", "namesakes") for name in ("a", "b")]
    assert sync(suites) == 0
    runs = runs_of(client, "namesakes")
    assert len(runs) == 6
    for suite in suites:
        parent = run_id_of(suite, store_uri())
        assert len([run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent]) == 2


def test_another_store_gets_everything_and_no_number_of_the_first(
    run_dir: Path, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    mirror = Mirror(run_dir, "first")
    assert mirror.push()
    first = run_id_of(run_dir, store_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "mlruns")
    other = store_uri()
    go_on(run_dir)
    assert Mirror(run_dir, "second").finish()
    second = run_id_of(run_dir, other)
    assert first != second
    everything_is_there(MlflowClient(other), second, run_dir)
    # A store of the same relative name elsewhere is another one.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read_ledger(run_dir, store_uri()).run_id is None


def test_a_store_that_was_moved_has_the_run_already(
    run_dir: Path, tmp_path: Path, client: Any, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    assert Mirror(run_dir, "moved").push()
    run_id = run_id_of(run_dir, store)
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "mlflow.db")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    go_on(run_dir)
    assert sync([run_dir]) == 0
    assert run_id_of(run_dir, store_uri()) == run_id
    moved = MlflowClient(store_uri())
    assert stored(moved, run_id) == written(run_dir)
    assert os.path.samefile(store_uri().removeprefix("sqlite:///"), tmp_path / "mlflow.db")
