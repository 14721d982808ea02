"""Runs of commit 9340c6c continue and are reported as that commit would have done it; README.md says what they are."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_testbed.launcher.cli.main import main
from tests.old_runs import driver
from tests.train.results import read_evaluations, read_metrics, read_weights

# The bits are the same where the archive was made. Another processor adds up in another order, and eight steps make
# that larger. An optimizer that has lost its moments makes a loss differ by 1.6e-2, and a tensor by 0.69 of its norm.
LOSS_TOLERANCE, WEIGHTS_TOLERANCE = 2e-3, 0.05
# What is computed from the same counts and losses.
REPORT_TOLERANCE = 1e-6


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the old runs lie; the working directory."""
    with tarfile.open(Path(__file__).with_name("runs.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_stopped_run_continues_to_the_end_it_would_have_had(
    old: Path, run_on_ranks: Callable[..., list[Any]]
) -> None:
    run_on_ranks(driver.resume, 1, str(old))
    found, expected = read_metrics(old / "stopped"), read_metrics(old / "finished")
    assert [(line["kind"], line["step"]) for line in found] == [(line["kind"], line["step"]) for line in expected]
    for line, other in zip(found, expected, strict=True):
        assert line.keys() >= other.keys()  # Later versions tell more.
        losses = {key: value for key, value in other.items() if key.startswith(("loss", "cross_entropy"))}
        assert {key: line[key] for key in losses} == pytest.approx(losses, rel=LOSS_TOLERANCE)
    evaluations = read_evaluations(old / "stopped")
    for name, arrays in read_evaluations(old / "finished").items():
        assert evaluations[name].keys() >= arrays.keys()
        np.testing.assert_allclose(evaluations[name]["sequence_loss_N"], arrays["sequence_loss_N"], rtol=LOSS_TOLERANCE)
    weights, others = read_weights(old / "stopped"), read_weights(old / "finished")
    assert weights.keys() == others.keys()
    for name, weight in others.items():
        apart = torch.linalg.vector_norm((weights[name] - weight).double())
        assert apart <= WEIGHTS_TOLERANCE * torch.linalg.vector_norm(weight.double()), name
    config = (old / "stopped" / "config.yaml").read_text(encoding="utf-8")
    assert "\nablation:\n" in config and "\nexamination:\n" not in config


def test_a_finished_suite_is_finished_and_its_report_says_the_same(
    old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = json.loads((old / "suite" / "results.json").read_text(encoding="utf-8"))
    (old / "suite" / "results.json").unlink()
    # The same command finds nothing to train, and reports.
    assert main(["compare", "suite.yaml", "--runs-dir", "."]) == 0
    assert "6 of 6 runs are finished and skipped" in capsys.readouterr().err
    assert_says(json.loads((old / "suite" / "results.json").read_text(encoding="utf-8")), expected)


def assert_says(found: Any, expected: Any, place: str = "results") -> None:
    """All that was said is said, and with the same value; more may be said."""
    if isinstance(expected, dict):
        assert expected.keys() <= found.keys(), place
        for key, value in expected.items():
            assert_says(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_says(found[number], value, f"{place}[{number}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=REPORT_TOLERANCE, abs=REPORT_TOLERANCE, nan_ok=True), place
    else:
        assert found == expected, place
