"""`compare` as a whole, with a stub for the trainings and for the data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from moe_testbed.data import build
from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.report.write import print_report
from moe_testbed.launcher.run import ownership
from moe_testbed.launcher.suites import compare as compare_module
from moe_testbed.launcher.suites.compare import compare

MakeSuite = Callable[..., Suite]
RUNS = Path("runs")
EVENTS = Path("runs/stubs/events.txt")


@pytest.fixture(autouse=True)
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mixes that were built."""
    mixes: list[str] = []
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: mixes.append(mix.name))
    return mixes


def starts() -> list[str]:
    return [line.split()[1] for line in EVENTS.read_text().splitlines() if line.startswith("start")]


def test_everything_is_trained_once_and_then_skipped(
    make_suite: MakeSuite, stub_command: list[str], built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(make_suite("a", "b"), RUNS, 1, stub_command) == 0
    assert starts() == ["a-seed1", "b-seed1"]
    assert compare(make_suite("a", "b"), RUNS, 1, stub_command) == 0
    assert starts() == ["a-seed1", "b-seed1"]
    assert built == ["two"], "a mix is built once for all runs, and not at all where nothing is left to train"
    output = capsys.readouterr()
    assert "2 of 2 runs are finished and skipped" in output.err
    assert output.out.rstrip().endswith("Report: runs/stubs/report.html")
    assert Path("runs/stubs/report.html").exists() and Path("runs/stubs/results.csv").exists()


def test_side_by_side_the_longest_run_comes_first(
    make_suite: MakeSuite, stub_command: list[str], write: Callable[[str, str], Path]
) -> None:
    make_suite("a")
    longer = "{overrides: {training.steps: 8}}"
    write("lengths.yaml", f"name: stubs\nexperiment: small.yaml\nruns:\n  short: {{}}\n  b: {longer}\n  c: {longer}\n")
    assert compare(load_suite("lengths.yaml"), RUNS, 2, stub_command) == 0
    assert starts()[2] == "short-seed1"
    EVENTS.unlink()
    assert compare(load_suite("lengths.yaml", ["seeds=[2]"]), RUNS, 1, stub_command) == 0
    assert starts() == ["short-seed2", "b-seed2", "c-seed2"]


def test_runs_of_another_user_are_continued_with_trust_only(
    make_suite: MakeSuite, stub_command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = make_suite("a")
    compare(suite, RUNS, 1, stub_command)
    (RUNS / "stubs" / "a-seed1" / "status.json").unlink()
    commands: list[list[str]] = []
    monkeypatch.setattr(ownership, "_owner", lambda path, follow: 54_321)
    monkeypatch.setattr(compare_module, "train_all", lambda *arguments: commands.append([*arguments[-1]]) or {})
    with pytest.raises(ConfigError, match="a-seed1 belongs to user 54321"):
        compare(suite, RUNS, 1, stub_command)
    assert not commands
    compare(suite, RUNS, 1, stub_command, trust=True)
    assert commands == [[*stub_command, "--trust"]]


def test_a_failed_run_is_shown_with_its_reason_and_tried_again_by_the_next_call(
    make_suite: MakeSuite, stub_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    suite = make_suite("a", "wrong_input", "c")
    assert compare(suite, RUNS, 2, stub_command) == 1
    assert sorted(starts()) == ["a-seed1", "c-seed1", "wrong_input-seed1"]
    assert "a value is wrong; mend it" in capsys.readouterr().out
    assert compare(suite, RUNS, 1, stub_command) == 0, "the stub fails at step 2 only, where the second call is past"
    assert starts()[3:] == ["wrong_input-seed1"]


def test_a_changed_config_is_refused_before_anything_starts(make_suite: MakeSuite, stub_command: list[str]) -> None:
    compare(make_suite("a"), RUNS, 1, stub_command)
    changed = load_suite("stubs.yaml", ["training.learning_rate=1"])
    with pytest.raises(ConfigError, match=r"runs/stubs/a-seed1 holds a run that differs in training"):
        compare(changed, RUNS, 1, stub_command)
    assert starts() == ["a-seed1"]


def test_what_does_not_decide_results_may_change(make_suite: MakeSuite, stub_command: list[str]) -> None:
    compare(make_suite("a"), RUNS, 1, stub_command)
    assert compare(load_suite("stubs.yaml", ["runtime.threads=2"]), RUNS, 1, stub_command) == 0
    assert starts() == ["a-seed1"]


def test_folders_hold_the_resolved_suite_and_configs(make_suite: MakeSuite, stub_command: list[str]) -> None:
    compare(make_suite("a"), RUNS, 1, stub_command)
    suite = yaml.safe_load(Path("runs/stubs/suite.yaml").read_text())
    assert (suite["name"], suite["seeds"], list(suite["runs"])) == ("stubs", [1], ["a"])
    config = yaml.safe_load(Path("runs/stubs/a-seed1/config.yaml").read_text())
    assert (config["name"], config["seed"], config["training"]["steps"]) == ("a", 1, 4)


def test_two_comparisons_of_one_folder_are_refused(make_suite: MakeSuite, stub_command: list[str]) -> None:
    suite = make_suite("a")
    Path("runs/stubs").mkdir(parents=True)
    with FileLock("runs/stubs/.lock"), pytest.raises(ConfigError, match="is being compared or submitted"):
        compare(suite, RUNS, 1, stub_command)


def test_a_report_of_another_folder_is_refused(make_suite: MakeSuite) -> None:
    make_suite("a")
    Path("elsewhere").mkdir()
    with pytest.raises(ConfigError, match="elsewhere is not a suite's folder"):
        print_report(Path("elsewhere"))


def test_results_name_every_run(make_suite: MakeSuite, stub_command: list[str]) -> None:
    compare(make_suite("a", "always_fails"), RUNS, 2, stub_command)
    results = json.loads(Path("runs/stubs/results.json").read_text())
    reasons = {run["label"]: run["trainings"][0]["reason"] for run in results["runs"]}
    assert reasons["always_fails"] == "RuntimeError: always the same"
