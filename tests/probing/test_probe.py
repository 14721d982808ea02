"""`moe-testbed probe` on small trained runs: what is learned, what is written, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_testbed.launcher.checkpoint.own_run import load_model, open_run
from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.probing import ProbedRow, ProbingRecord
from tests.probing.conftest import ENCODER, SEQ2SEQ, TrainRun

CAUSAL: dict[str, Any] = {}
LABELS = {"routing": {"router": {"name": "reference"}, "balance": "none"}}


def probed(run: Path, task: Path, *overrides: str) -> ProbingRecord:
    """What the command has written into the folder of the run."""
    assert main(["probe", str(run), "--task", str(task), "--device", "cpu", *overrides]) == 0
    (record,) = [record for record in RunFolder(run).read_probing() if record.task == task.stem]
    return record


def row(record: ProbingRecord, name: str) -> ProbedRow:
    """The row of this name."""
    return next(row for row in record.rows if row.name == name)


@pytest.mark.parametrize("parts", [ENCODER, SEQ2SEQ, CAUSAL], ids=["encoder", "encoder_decoder", "causal"])
def test_what_stands_around_a_word_is_found_by_those_alone_who_see_it(
    parts: dict[str, Any], train_run: TrainRun, tasks: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The label of a number is the language of the words around it: states of a model tell, a table does not."""
    run = train_run(parts)
    record = probed(run, tasks["around"], "learning.epochs=12", "learning.rates=[0.01, 0.03]")
    shown = capsys.readouterr().out
    assert [row.name for row in record.rows] == [
        "tiny-seed1", "its table alone", "random model", "random table", "words alone", "majority",
    ]  # fmt: skip
    assert [row.floor for row in record.rows] == [False, False, True, True, True, True]
    assert all(row.name in shown for row in record.rows)
    for name in ("its table alone", "random table", "words alone", "majority"):
        assert row(record, name).linear.low < 0.65  # type: ignore[union-attr]
    for name in ("tiny-seed1", "random model"):
        seeing = row(record, name)
        assert seeing.linear is not None and seeing.fine_tuned is not None
        assert seeing.fine_tuned.low > 0.8
        assert len(seeing.fine_tuned.by_seed) == 2
    own = row(record, "tiny-seed1")
    assert own.linear is not None and own.linear_lead is not None
    difference = own.linear.value - row(record, "random table").linear.value  # type: ignore[union-attr]
    assert own.linear_lead.value == pytest.approx(difference)
    assert record.test_documents >= 50 and record.test_labels > 100
    assert record.classes == ("greek", "latin")
    assert set(record.rates) == {"tiny-seed1", "random model"} and set(record.rates.values()) <= {0.01, 0.03}


def test_a_probe_is_the_same_again_and_leaves_the_run_as_it_is(train_run: TrainRun, tasks: dict[str, Path]) -> None:
    run = train_run(ENCODER)
    before = load_model(open_run(run, None, print)).state_dict()
    first = probed(run, tasks["language"])
    assert probed(run, tasks["language"]) == first
    for name, tensor in load_model(open_run(run, None, print)).state_dict().items():
        assert torch.equal(tensor, before[name])
    assert row(first, "tiny-seed1").linear.low > row(first, "majority").linear.high  # type: ignore[union-attr]
    content = json.loads((run / "probing" / "language.json").read_text())
    assert ProbingRecord.of(content) == first


def test_domain_labels_reach_a_router_that_reads_them(train_run: TrainRun, tasks: dict[str, Path]) -> None:
    run = train_run(ENCODER, **LABELS)
    assert probed(run, tasks["language"], "domain=greek", "learning.seeds=[1]").rows[0].linear is not None


def test_a_seq2seq_learns_to_write(
    train_run: TrainRun, tasks: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_run(SEQ2SEQ, model={"dense_baseline": True})
    record = probed(run, tasks["reversed"], "learning.epochs=6")
    assert [row.name for row in record.rows] == ["tiny-seed1", "random model", "word by word", "copied"]
    own = row(record, "tiny-seed1")
    assert own.linear is None and own.fine_tuned is not None and len(own.fine_tuned.by_seed) == 2
    # Backwards, words of 2 to 5 letters have all of the single letters and few pairs of them.
    assert 0.1 < row(record, "copied").linear.value < 0.5  # type: ignore[union-attr]
    assert record.examples and all(given == wanted[::-1] for given, wanted, _ in record.examples)
    shown = capsys.readouterr().out
    assert f"given    {record.examples[0][0]}" in shown


@pytest.mark.parametrize(
    ("parts", "task", "overrides", "message"),
    [
        (ENCODER, "reversed", [], "asks for texts to be written, and {run} has the architecture encoder; give a run"),
        (CAUSAL, "reversed", [], "asks for texts to be written, and {run} has the architecture causal; give a run"),
        ({**ENCODER, **LABELS}, "language", [], "every token, and the probing task 'language' names no domain"),
        ({**ENCODER, **LABELS}, "language", ["domain=thai"], "'thai'; the run's domains are latin, greek, digits"),
        ({**SEQ2SEQ, **LABELS}, "reversed", ["domain=greek"], "which is not known of a text that is yet to be written"),
        (ENCODER, "language", ["learning.rates=[1.0e+30]"], "diverges at the learning rate 1e+30; give lower ones"),
        (ENCODER, "language", ["limits.trian=3"], "limits.trian"),
        (ENCODER, "language", ["metric=chrf"], "metric is 'chrf', which does not score a task of the kind 'sequence'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    parts: dict[str, Any],
    task: str,
    overrides: list[str],
    message: str,
    train_run: TrainRun,
    tasks: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_run(parts)
    before = sorted(run.rglob("*"))
    assert main(["probe", str(run), "--task", str(tasks[task]), *overrides]) == 2
    error = capsys.readouterr().err
    assert message.format(run=run) in error and "Traceback" not in error
    assert sorted(run.rglob("*")) == before


def test_text_that_was_trained_on_is_no_test(
    train_run: TrainRun, own_data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The documents of the mix itself, with labels: those that it trains on are refused."""
    glob = own_data["mix"]["domains"]["latin"]["sources"][0]["glob"]
    documents = sorted(Path(glob).parent.glob("*.txt"))
    lines = [f"{number % 2}\t{' '.join(path.read_text().split())}" for number, path in enumerate(documents)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    task = tmp_path / "leaky.yaml"
    task.write_text(
        f"name: leaky\nkind: sequence\nmetric: accuracy\nreader: labelled_lines\nsplit: {{kind: random, test: 0.5}}\n"
        f"sources:\n  - {{kind: files, glob: {tmp_path}/lines.txt}}\n"
    )
    assert main(["probe", str(train_run(ENCODER)), "--task", str(task)]) == 2
    assert "would test on text that the run was trained on" in capsys.readouterr().err


def test_a_task_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", str(tmp_path), "--task", "brown_poss"]) == 2
    assert "configs/probes/brown_pos.yaml" in capsys.readouterr().err
