"""How far runs are, read from their folders and shown."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import Progress, Status
from moe_testbed.launcher.suites.progress import ProgressView, duration

TRAIN = '{"kind": "train", "step": %d, "loss": %f}\n'


def test_progress_is_the_last_whole_training_line(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).read_progress(9) == Progress(0, 9, None)
    text = TRAIN % (3, 5.5) + '{"kind": "evaluation", "step": 3, "cross_entropy": 6}\n' + '{"kind": "train", "st'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert RunFolder(tmp_path).read_progress(9) == Progress(3, 9, 5.5)


def test_progress_of_a_long_run_reads_only_its_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(TRAIN % (step, 1 / step) for step in range(1, 5001)))
    assert RunFolder(tmp_path).read_progress(5000).step == 5000


@pytest.mark.parametrize("content", [None, "", '{"state": "fin', "[1]"])
def test_a_status_that_cannot_be_read_is_empty(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "status.json").write_text(content)
    assert RunFolder(tmp_path).read_status() == Status("missing", 0, 0, None)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (75, "1:15"), (3661, "1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_elsewhere_than_on_a_terminal_lines_come_every_15_seconds() -> None:
    now, said = [0.0], io.StringIO()
    view = ProgressView(said, 2, clock=lambda: now[0])
    view.event("a: starts")
    for now[0], step in ((1.0, 10), (15.0, 100), (20.0, 150), (31.0, 260)):
        view.update([("a", Progress(step, 500, 4.0))], 0)
    assert said.getvalue().splitlines() == [
        "[0:00] a: starts",
        "[0:15] a: step 100 of 500, loss 4.000",
        "[0:31] a: step 260 of 500, loss 4.000, 0:24 left",
    ]
