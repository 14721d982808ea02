"""The mirror, against a real SQLite store read back through MLflow's own client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.tracking.mirror import Mirror, SuiteMirror
from moe_testbed.launcher.tracking.names import key_of
from moe_testbed.launcher.tracking.state import MAX_KEYS_OF_A_KIND, new_points, read_ledger, write_ledger
from moe_testbed.launcher.tracking.sync import sync
from moe_testbed.launcher.tracking.uri import keeps_files, path_of, store_uri
from tests.processes.python import run_python
from tests.tracking.folders import append, append_line, make_run

mlflow_tracking = pytest.importorskip("mlflow.tracking")


def ledger_of(folder: Path, store: str) -> Any:
    return read_ledger(folder, store)


def test_a_finished_run_is_all_there(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "all")
    append(run_dir, range(1, 31))
    evaluation = {"kind": "evaluation", "step": 30, "cross_entropy": 2.5, "cross_entropy/law & order": 2.0}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(evaluation) + "\n")
    mirror = Mirror(run_dir, "everything")
    assert mirror.push()
    assert mirror.finish()

    run = client.get_run(ledger_of(run_dir, store).run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "all"
    assert client.get_experiment(run.info.experiment_id).name == "everything"
    assert run.data.params == {"name": "all", "training.steps": "30", "training.betas": "[0.9, 0.95]"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(step, 5.0 / step) for step in range(1, 31)]
    assert run.data.metrics[key_of("evaluation/cross_entropy/law & order")] == 2.0
    artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"config.yaml", "summary.json", "status.json", "evaluations", "matrices"}
    table = Path(client.download_artifacts(run.info.run_id, "matrices/counts_top_k.csv", str(tmp_path))).read_text()
    assert table.splitlines()[:2] == [
        "moe_layer,domain,expert_0,expert_1,expert_2,expert_3,expert_4,expert_5",
        "0,law,0,1,2,3,4,5",
    ]
    assert table.splitlines()[-1] == "0,music,6,7,8,9,10,11"


def test_a_continued_run_is_one_run_without_duplicates(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "continued")
    append(run_dir, range(1, 21), extra='{"kind": "train", "step": 21, "lo')
    assert Mirror(run_dir, "resume").push()
    first = ledger_of(run_dir, store).run_id

    append(run_dir, range(11, 31), extra="")  # from the checkpoint of step 10, behind the cut-off line
    second = Mirror(run_dir, "resume")
    assert second.push()
    assert second.finish("failed")
    assert ledger_of(run_dir, store).run_id == first
    history = client.get_metric_history(first, "train/loss")
    assert [point.step for point in history] == list(range(1, 31))
    assert client.get_run(first).info.status == "FAILED"

    append(run_dir, range(31, 33))  # started again after its end
    assert Mirror(run_dir, "resume").push()
    assert client.get_run(first).info.status == "RUNNING"
    experiment = client.get_experiment_by_name("resume")
    assert len(client.search_runs([experiment.experiment_id])) == 1


def test_a_mirror_killed_between_sending_and_remembering_sends_nothing_twice(
    tmp_path: Path, client: Any, store: str
) -> None:
    run_dir = make_run(tmp_path / "killed")
    append(run_dir, range(1, 11))
    Mirror(run_dir, "killed").push()
    run_id = ledger_of(run_dir, store).run_id
    forgetful = {"run_id": None, "offset": 0, "steps": {}, "sent": {}}
    ledger = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps({**ledger, **forgetful}))
    append(run_dir, range(11, 13))
    assert Mirror(run_dir, "killed").push()
    assert ledger_of(run_dir, store).run_id == run_id
    assert [point.step for point in client.get_metric_history(run_id, "train/loss")] == list(range(1, 13))


def test_a_file_cut_back_to_a_checkpoint_is_read_again(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "cut")
    append(run_dir, range(1, 21))
    Mirror(run_dir, "cut").push()
    (run_dir / "metrics.jsonl").unlink()
    append(run_dir, range(1, 11))
    assert Mirror(run_dir, "cut").push()
    append(run_dir, range(11, 26))
    assert Mirror(run_dir, "cut").push()
    history = client.get_metric_history(ledger_of(run_dir, store).run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 26))


def test_values_that_are_not_finite_stay_out_and_keys_are_bounded(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "wild", steps=3, long="x" * 9000)
    many = {f"value_{number:04d}": 1.0 for number in range(2 * MAX_KEYS_OF_A_KIND)}
    append(run_dir, range(1, 3), gradient_norm=float("nan"), learning_rate=float("inf"), **many)
    assert Mirror(run_dir, "wild").finish()
    run = client.get_run(ledger_of(run_dir, store).run_id)
    assert len(run.data.metrics) == MAX_KEYS_OF_A_KIND
    assert "train/loss" in run.data.metrics
    assert not {"train/gradient_norm", "train/learning_rate"} & set(run.data.metrics)
    assert run.data.params["long"] == "x" * 5999 + "…"


def test_a_store_that_lost_the_run_gets_it_anew(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "lost")
    append(run_dir, range(1, 4))
    Mirror(run_dir, "lost").push()
    ledger = json.loads((run_dir / "mlflow.json").read_text())
    (run_dir / "mlflow.json").write_text(json.dumps({**ledger, "run_id": "0" * 32}))
    assert Mirror(run_dir, "lost").finish()
    run_id = ledger_of(run_dir, store).run_id
    assert len(client.get_metric_history(run_id, "train/loss")) == 3


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(500)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


def test_an_unreachable_store_is_told_once_and_caught_up_with_later(
    tmp_path: Path, client: Any, store: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server = HTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in (("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0"), ("MLFLOW_TRACKING_URI", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    run_dir = make_run(tmp_path / "away")
    append(run_dir, range(1, 6))
    mirror = Mirror(run_dir, "away")
    assert not mirror.push()
    assert not mirror.push()
    assert not mirror.finish()
    server.shutdown()
    server.server_close()
    assert capsys.readouterr().err.count("MLflow store not reached") == 1

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert Mirror(run_dir, "away").finish()
    assert len(client.get_metric_history(ledger_of(run_dir, store).run_id, "train/loss")) == 5


def test_a_suite_is_a_parent_run_with_its_report(tmp_path: Path, client: Any, store: str) -> None:
    suite = tmp_path / "demo"
    own = make_run(suite / "early-seed1")
    append(own, range(1, 4))
    assert Mirror(own, "suites").finish()
    append(make_run(suite / "later-seed1"), range(1, 4))
    (suite / "later-seed1" / "status.json").write_text('{"state": "running"}')
    (make_run(suite / "not-begun-seed1") / "status.json").unlink()
    (suite / "report.html").write_text("<p>")
    (suite / "figures").mkdir()
    (suite / "figures" / "scatter.svg").write_text("<svg/>")

    mirror = SuiteMirror(suite, "suites", interval=0.01)
    mirror.start()
    parent = mirror.parent()
    assert mirror.finish()
    assert mirror.finish()
    assert SuiteMirror(suite, "suites").parent() == parent

    runs = client.search_runs([client.get_experiment_by_name("suites").experiment_id])
    assert len(runs) == 3
    children = {run.info.run_name: run for run in runs if run.info.run_id != parent}
    assert {run.data.tags["mlflow.parentRunId"] for run in children.values()} == {parent}
    assert children["early-seed1"].info.status == "FINISHED"
    assert children["later-seed1"].info.status == "KILLED"
    assert {artifact.path for artifact in client.list_artifacts(parent)} == {"report.html", "figures"}


# In processes that share nothing with this one, as two trainings would.
MIRROR = """
import sys
from pathlib import Path
from moe_testbed.launcher.tracking.mirror import Mirror
sys.exit(not Mirror(Path(sys.argv[1]), "race").finish())
"""


@pytest.mark.slow
def test_two_runs_side_by_side_create_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"sqlite:///{tmp_path / 'fresh.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    folders = [make_run(tmp_path / name) for name in ("one", "two")]
    for folder in folders:
        append(folder, range(1, 4))
    processes = [subprocess.Popen([sys.executable, "-c", MIRROR, str(folder)]) for folder in folders]
    assert [process.wait(120) for process in processes] == [0, 0]
    client = mlflow_tracking.MlflowClient(uri)
    assert len(client.search_runs([client.get_experiment_by_name("race").experiment_id])) == 2


# A change of a table in SQLite is a copy of it, which a process leaves behind that is killed meanwhile.
KILLED = f"""
import os, signal, sqlalchemy
def kill(connection, cursor, statement, *others):
    if statement.startswith("INSERT INTO _alembic_tmp_"):
        os.kill(os.getpid(), signal.SIGKILL)
sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", kill)
{MIRROR}"""


@pytest.mark.slow
def test_a_store_is_whole_though_its_creation_was_killed(tmp_path: Path) -> None:
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'fresh.db'}"}
    folder = make_run(tmp_path / "run")
    append(folder, range(1, 4))
    assert run_python("-c", KILLED, str(folder), environment=environment).returncode == -signal.SIGKILL
    done = run_python("-c", MIRROR, str(folder), environment=environment)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*.new"))


def test_the_default_store_is_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert store_uri() == f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.mark.parametrize(
    ("given", "path", "files"),
    [
        ("sqlite:///mlflow.db", "mlflow.db", False),
        ("mlruns", "mlruns", True),
        ("./mlruns", "mlruns", True),
        ("file:mlruns", "mlruns", True),
        ("file:///srv/with%20space", "/srv/with space", True),
        ("http://host:5000", None, False),
        ("mysql+pymysql://me@host/mlflow", None, False),
        ("databricks", None, False),
        ("databricks://profile", None, False),
    ],
)
def test_where_a_store_is(
    given: str, path: str | None, files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert path_of(store_uri()) == (tmp_path / path if path else None)
    assert keeps_files(store_uri()) is files
    assert path is not None or store_uri() == given
    # Behind a server, by the numbers of experiments: those of files have 18 digits, those of databases count.
    assert keeps_files(store_uri(), "779210498846775953") and keeps_files(store_uri(), "12") is files


@pytest.mark.parametrize("content", ['{"store": ', "[]", '{"store": "a"}', "{}"])
def test_a_damaged_ledger_is_told_once_and_ends_nothing(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.json").write_text(content)
    assert read_ledger(tmp_path, "store").offset == 0
    assert capsys.readouterr().err.count("is damaged") == 1
    assert read_ledger(tmp_path, "store").run_id is None
    assert capsys.readouterr().err == ""
    assert (tmp_path / "mlflow.json.damaged").read_text() == content


def test_batches_are_bounded_and_the_ledger_moves_with_them(tmp_path: Path) -> None:
    append(tmp_path, range(1, 701), cross_entropy=1.0)
    ledger = read_ledger(tmp_path, "store")
    batches = list(new_points(RunFolder(tmp_path), ledger))
    assert [len(points) for points, _ in batches] == [1000, 400]
    assert [sent.steps for _, sent in batches] == [{"train": 500}, {"train": 700}]
    write_ledger(tmp_path, batches[0][1])
    again = [points for points, _ in new_points(RunFolder(tmp_path), read_ledger(tmp_path, "store"))]
    assert again == [batches[1][0]]
    other = read_ledger(tmp_path, "another store")
    assert (other.run_id, other.offset, other.key) == (None, 0, ledger.key)


def test_a_run_that_a_store_hears_of_late_has_its_own_times(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "late")
    append(run_dir, range(1, 31))
    os.utime(run_dir / "metrics.jsonl", (1_700_000_003, 1_700_000_003))  # 3.0 seconds after the beginning
    os.utime(run_dir / "status.json", (1_700_000_004, 1_700_000_004))
    assert Mirror(run_dir, "late").finish()
    run_id = ledger_of(run_dir, store).run_id
    info = client.get_run(run_id).info
    assert (info.start_time, info.end_time) == (1_700_000_000_000, 1_700_000_004_000)
    times = [point.timestamp for point in client.get_metric_history(run_id, "train/loss")]
    assert times == [1_700_000_000_000 + 100 * step for step in range(1, 31)]


def test_keys_of_one_kind_leave_room_for_the_others_and_those_left_out_are_told_once(
    tmp_path: Path, client: Any, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make_run(tmp_path / "crowded")
    append(run_dir, [1], **{f"layer_{layer:03d}": 1.0 for layer in range(150)})
    append_line(run_dir, kind="system", step=1, seconds=0.1, cpu=1.0)
    assert Mirror(run_dir, "crowded").push()
    append(run_dir, [2], another=1.0)
    assert Mirror(run_dir, "crowded").finish()
    # One of the hundred is the loss.
    names = ", ".join(f"train/layer_{layer:03d}" for layer in range(99, 109))
    told = [line for line in capsys.readouterr().err.splitlines() if "layer_" in line]
    assert len(told) == 1 and told[0].endswith(names)
    run = client.get_run(ledger_of(run_dir, store).run_id)
    assert run.data.tags["metrics_left_out"] == names
    capsys.readouterr()
    assert sync([run_dir]) == 0
    assert "; only the first 100 metrics of a kind\n" in capsys.readouterr().out
    assert run.data.metrics["system/cpu"] == 1.0
    assert len(run.data.metrics) == 101


def test_a_file_replaced_between_two_pushes_is_read_from_its_start(tmp_path: Path, client: Any, store: str) -> None:
    run_dir = make_run(tmp_path / "replaced")
    mirror = Mirror(run_dir, "replaced")
    append(run_dir, range(1, 10))
    assert mirror.push()
    # As `RunFolder.rewind` does; what is new to the store begins before the offset that it has been sent up to.
    (run_dir / "metrics.jsonl").rename(run_dir / "old.jsonl")
    append(run_dir, [8, 9, 10, 11, 12, 13, 14, 15, 16])
    assert mirror.push()
    history = client.get_metric_history(ledger_of(run_dir, store).run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 17))
