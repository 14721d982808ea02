"""A chain of real trainings: an encoder, an encoder-decoder that starts from it, and an encoder from that one's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.launcher.checkpoint import stale
from moe_testbed.launcher.config.suite import Suite, load_suite
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.suites.compare import compare
from tests.distributed.conftest import data, make_experiment
from tests.train.results import assert_same_run

__all__ = ["data", "make_experiment"]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="trainings are forks on Linux only")]

MakeExperiment = Callable[..., dict[str, Any]]
CHAIN = ("mlm", "seq2seq", "again")
# Listed from the last to the first, so that nothing but their starts puts them in order.
SUITE = """
name: chain
experiment: experiment.yaml
runs:
  again:
    overrides: {start.encoder.run: seq2seq}
  seq2seq:
    overrides:
      model.architecture: encoder_decoder
      objective: denoising
      start.encoder.run: mlm
      freeze.encoder: {until: 0.5, warmup_steps: 2}
  mlm: {}
"""


@pytest.fixture(scope="module")
def folder(make_experiment: MakeExperiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory: the suite, and its runs, which nothing has disturbed, in undisturbed/."""
    folder = tmp_path_factory.mktemp("chain")
    model = make_experiment()["model"] | {"architecture": "encoder"}
    experiment = make_experiment(model=model, objective={"name": "masked"}, checkpoint={"every": 2, "keep": 2})
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    (folder / "suite.yaml").write_text(SUITE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert compare(load_suite("suite.yaml"), Path("undisturbed"), 2) == 0
    return folder


@pytest.fixture
def suite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Suite:
    """The suite, in its working directory, with a copy of its finished runs in runs/."""
    monkeypatch.chdir(folder)
    shutil.rmtree("runs", ignore_errors=True)
    shutil.copytree("undisturbed", "runs")
    return load_suite("suite.yaml")


def run_dir(label: str, runs_dir: str = "runs") -> Path:
    return Path(runs_dir, "chain", f"{label}-seed1")


def test_a_chain_is_trained_in_order(folder: Path) -> None:
    runs = [RunFolder(folder / run_dir(label, "undisturbed")) for label in CHAIN]
    assert all(run.is_finished for run in runs)
    assert runs[0].status_time_ns < runs[1].start_file.stat().st_mtime_ns
    assert runs[1].status_time_ns < runs[2].start_file.stat().st_mtime_ns
    starts = [run.read_start() for run in runs]
    assert starts[0] is None
    assert [start.run for start in starts[1:] if start] == [str(run_dir(label, "undisturbed")) for label in CHAIN[:2]]


@pytest.mark.parametrize("label", CHAIN[:2])
def test_a_killed_comparison_continues_bit_for_bit(suite: Suite, label: str) -> None:
    shutil.rmtree("runs")
    command = [sys.executable, "-m", "moe_testbed.launcher", "compare", "suite.yaml", "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while RunFolder(run_dir(label)).read_status().step < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    until_free(RunFolder(run_dir(label)))
    assert not RunFolder(run_dir("again")).is_finished
    assert compare(suite, Path("runs"), 2) == 0
    for name in CHAIN:
        assert_same_run(run_dir(name), run_dir(name, "undisturbed"))


def until_free(run: RunFolder) -> None:
    """Returns once the kernel has ended the training with the comparison."""
    deadline = time.monotonic() + 60
    while any(str(run.path) in path for path in outputs()):
        assert time.monotonic() < deadline, "the training outlives the comparison"
        time.sleep(0.05)


def outputs() -> list[str]:
    """The files that processes write to."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit():
                found += [os.readlink(process / "fd/1")]
        except OSError:
            continue
    return found


def test_a_parent_that_comes_to_the_same_weights_again_leaves_its_children_good(
    suite: Suite, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {label: run_dir(label).stat().st_ino for label in CHAIN}
    shutil.rmtree(run_dir("mlm"))
    assert compare(suite, Path("runs"), 2) == 0
    said = capsys.readouterr().err
    assert "seq2seq-seed1 has started from mlm-seed1, which is trained anew: if other weights come of it" in said
    for label in CHAIN:
        assert_same_run(run_dir(label), run_dir(label, "undisturbed"))
    assert {label: run_dir(label).stat().st_ino for label in CHAIN[1:]} == {label: before[label] for label in CHAIN[1:]}


def test_a_child_of_other_weights_is_refused_before_anything_is_trained(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An encoder as well, trained elsewhere.
    shutil.rmtree(run_dir("mlm") / "checkpoints")
    shutil.copytree(run_dir("again") / "checkpoints", run_dir("mlm") / "checkpoints")
    shutil.rmtree(run_dir("again"))
    message = (
        "runs/chain/seq2seq-seed1 has started from runs/chain/mlm-seed1, which has been trained anew since, with "
        "other weights: it is stale; remove seq2seq-seed1 to train it anew, or put the former mlm-seed1 back"
    )
    with pytest.raises(ConfigError, match=message):
        compare(suite, Path("runs"), 2)
    assert not RunFolder(run_dir("again")).has_begun and RunFolder(run_dir("seq2seq")).is_finished
    shutil.rmtree(run_dir("mlm"))
    shutil.copytree(run_dir("mlm", "undisturbed"), run_dir("mlm"))
    with monkeypatch.context() as patch:
        patch.setattr(stale, "digest", lambda checkpoint: pytest.fail("copies keep their times: nothing is read"))
        assert compare(suite, Path("runs"), 2) == 0


def test_a_child_of_other_weights_fails_once_its_parent_is_trained_anew(suite: Suite) -> None:
    # As if the parent had been trained by another version, before.
    start_file = RunFolder(run_dir("seq2seq")).start_file
    start = json.loads(start_file.read_text())
    start_file.write_text(json.dumps(start | {"digest": "other", "stamp": "other"}))
    shutil.rmtree(run_dir("mlm"))
    shutil.rmtree(run_dir("again"))
    assert compare(suite, Path("runs"), 2) == 1
    assert RunFolder(run_dir("mlm")).is_finished
    stale_one, last = (RunFolder(run_dir(label)).read_status() for label in CHAIN[1:])
    assert stale_one.state == "failed" and "it is stale; remove seq2seq-seed1" in str(stale_one.reason)
    assert last.reason == f"the run it starts from, seq2seq-seed1, failed: {stale_one.reason}"
    start_file.write_text(json.dumps(start))
    assert compare(suite, Path("runs"), 2) == 0, "nothing is lost: the former weights are there again"
    for label in CHAIN:
        assert_same_run(run_dir(label), run_dir(label, "undisturbed"))
