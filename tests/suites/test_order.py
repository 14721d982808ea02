"""Runs that start from others: they wait, they fail with those, and what does not go together is refused at once."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data import build
from moe_testbed.launcher.config.suite import SuiteRun, load_suite, suite_runs
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.report.write import print_report
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Status
from moe_testbed.launcher.suites.compare import compare
from moe_testbed.launcher.suites.order import generations, left_to_train, most_at_once, work_behind
from moe_testbed.launcher.suites.progress import ProgressView
from moe_testbed.launcher.suites.scheduling import train_all
from moe_testbed.launcher.suites.starts import check_starts

Write = Callable[[str, str], Path]
Load = Callable[..., list[SuiteRun]]

RUNS = Path("runs")
ENCODER = "{model.architecture: encoder, objective: masked}"


@pytest.fixture
def load(experiment: Path, write: Write) -> Load:
    """The trainings of a suite of encoders; arguments are labels and what each starts from."""

    def load(*overrides: str, **parents: str | None) -> list[SuiteRun]:
        starts = ((label, f"start.encoder.run: {parent}" if parent else "") for label, parent in parents.items())
        runs = "\n".join(f"  {label}: {{overrides: {{{start}}}}}" for label, start in starts)
        write("stubs.yaml", f"name: stubs\nexperiment: small.yaml\noverrides: {ENCODER}\nruns:\n{runs}\n")
        return suite_runs(load_suite("stubs.yaml", overrides), RUNS)

    return load


def finish(run: SuiteRun) -> None:
    RunFolder(run.run_dir).prepare(run.config)
    RunFolder(run.run_dir).write_status(Status("finished", 4, 4))


def names(runs: list[SuiteRun]) -> list[str]:
    return [run.label for run in runs]


def test_generations_and_what_is_left(load: Load) -> None:
    runs = load(c="b", b="a", a=None, d="a", other=None)
    assert runs[0].parents == ("b-seed1",) and runs[2].parents == ()
    assert [names(generation) for generation in generations(runs)] == [["a", "other"], ["b", "d"], ["c"]]
    assert most_at_once(runs) == 3, "c, d and other"
    finish(runs[2])
    assert names(left_to_train(runs)) == ["c", "b", "d", "other"]
    assert [names(generation) for generation in generations(left_to_train(runs))] == [["b", "d", "other"], ["c"]]
    finish(runs[0])
    assert names(left_to_train(runs)) == ["c", "b", "d", "other"], "b may come to other weights than c has started from"
    finish(runs[1])
    assert names(left_to_train(runs)) == ["d", "other"]


def test_the_work_behind_a_run_is_its_longest_chain(load: Load) -> None:
    runs = load(c="b", b="a", a=None, d="a", other=None)
    own = {"a-seed1": 1, "b-seed1": 10, "c-seed1": 100, "d-seed1": 50, "other-seed1": 60}
    expected = {"a-seed1": 111, "b-seed1": 110, "c-seed1": 100, "d-seed1": 50, "other-seed1": 60}
    assert work_behind(runs, own) == expected
    del own["a-seed1"], expected["a-seed1"]
    assert work_behind([run for run in runs if run.label != "a"], own) == expected, "a is finished"


def test_every_seed_has_parents_of_its_own(load: Load) -> None:
    runs = load("seeds=[1, 3]", a=None, b="a")
    assert [run.parents for run in runs] == [(), ("a-seed1",), (), ("a-seed3",)]


class Trained:
    """Trains with the stub and keeps what was said."""

    def __init__(self, runs: list[SuiteRun], command: list[str], jobs: int) -> None:
        for run in runs:
            RunFolder(run.run_dir).prepare(run.config)
        said = io.StringIO()
        self.failed = train_all(runs, jobs, {}, ProgressView(said, len(runs)), command)
        self.said = said.getvalue()
        lines = (RUNS / "stubs/events.txt").read_text().splitlines()
        self.events = [" ".join(line.split()[:2]) for line in lines]


def test_a_run_waits_for_its_parent_and_others_go_on_meanwhile(load: Load, stub_command: list[str]) -> None:
    # The stubs that meet go on once two runs have started.
    trained = Trained(load(child="meets_a", meets_a=None, meets_b=None), stub_command, jobs=2)
    assert trained.failed == {}
    events = trained.events
    assert sorted(events[:2]) == ["start meets_a-seed1", "start meets_b-seed1"]
    assert events.index("end meets_a-seed1") < events.index("start child-seed1")


def test_a_chain_is_trained_in_order_whatever_the_suites_order(load: Load, stub_command: list[str]) -> None:
    trained = Trained(load(c="b", b="a", a=None), stub_command, jobs=2)
    assert trained.events == [f"{event} {label}-seed1" for label in "abc" for event in ("start", "end")]


def test_a_killed_parent_is_continued_before_its_child_starts(load: Load, stub_command: list[str]) -> None:
    trained = Trained(load(child="dies_once", dies_once=None), stub_command, jobs=2)
    assert trained.failed == {}
    assert trained.events[-2:] == ["start child-seed1", "end child-seed1"]


def test_a_parent_that_fails_fails_all_that_start_from_it(
    load: Load, stub_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = load(grandchild="child", child="always_fails", always_fails=None, other=None)
    trained = Trained(runs, stub_command, jobs=2)
    reason = "the run it starts from, always_fails-seed1, failed: RuntimeError: always the same"
    transitive = f"the run it starts from, child-seed1, failed: {reason}"
    assert trained.failed == {
        "always_fails-seed1": "RuntimeError: always the same",
        "child-seed1": reason,
        "grandchild-seed1": transitive,
    }
    assert not any("child" in event for event in trained.events), "they have not started"
    assert "end other-seed1" in trained.events
    assert f"child-seed1: failed: {reason}" in trained.said
    assert RunFolder(RUNS / "stubs/grandchild-seed1").read_status() == Status("failed", 0, 4, transitive)


def test_what_a_finished_run_has_found_stays_if_its_parent_fails_anew(load: Load, stub_command: list[str]) -> None:
    runs = load(wrong_input=None, child="wrong_input", grandchild="child")
    finish(runs[1])
    trained = Trained(left_to_train(runs), stub_command, jobs=1)
    reason = "the run it starts from, wrong_input-seed1, failed: a value is wrong; mend it"
    assert trained.failed["child-seed1"] == reason
    assert f"child-seed1: stays as it is: {reason}" in trained.said
    assert RunFolder(runs[1].run_dir).is_finished
    assert RunFolder(runs[2].run_dir).read_status().state == "failed"


def test_a_report_of_parents_that_are_not_finished_says_which_runs_have_not_started(
    load: Load, monkeypatch: pytest.MonkeyPatch, stub_command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build_store", lambda mix, cache_dir, log: None)
    load(a=None, b="a")
    assert compare(load_suite("stubs.yaml"), RUNS, 1, stub_command) == 0
    for label, state in (("a", "running"), ("b", None)):
        status = RUNS / f"stubs/{label}-seed1/status.json"
        status.unlink()
        if state:
            RunFolder(status.parent).write_status(Status(state, 2, 4))
    capsys.readouterr()
    print_report(RUNS / "stubs")
    output = capsys.readouterr().out
    assert "a, seed 1: running at step 2 of 4: cut off" in output and "b, seed 1: missing: not started" in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["runs.b.overrides={start.encoder.run: a, model.hidden_size: 32}"],
            "b-seed1 is to start from a-seed1, and has model.hidden_size 32, not 16; make them alike",
        ),
        (
            ["runs.b.overrides={start.encoder.run: a, model.num_layers: 3}"],
            "b-seed1 is to start from a-seed1, but encoder.blocks.2.attention_norm.weight has shape (16,) in the one "
            "and is missing in the other; make layers, widths, experts and routing alike",
        ),
        (
            ["runs.b.overrides={start.encoder.run: a, model.moe.num_experts: 4}"],
            "has shape (4, 16) in the one and has shape (8, 16) in the other",
        ),
    ],
)
def test_an_encoder_of_other_sizes_is_refused_before_anything_is_trained(
    load: Load, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_starts(load(*overrides, a=None, b="a"))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_tables_alone_may_come_from_an_encoder_of_other_layers(load: Load) -> None:
    check_starts(load("runs.b.overrides={start.encoder: {run: a, take: tables}, model.num_layers: 3}", a=None, b="a"))
