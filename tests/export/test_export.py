"""The command: what it writes, what it refuses, and that nothing of a failure stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.export import export as exporting
from moe_testbed.launcher.export import native
from moe_testbed.launcher.export.folder import is_export
from tests.export import cases

TrainRun = Callable[[Mapping[str, Any]], Path]
DENSE = cases.dense(cases.ENCODER)


def test_the_folder_is_whole(train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "models" / "mlm"
    assert main(["export", str(train_run(DENSE)), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: EuroBertForMaskedLM\n"
    assert [path.name for path in out.parent.iterdir()] == ["mlm"]
    assert {path.name for path in out.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "testbed.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["EuroBertForMaskedLM"] and config["tie_word_embeddings"] is True
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: fill-mask\n")
    for said in (
        "| latin | unknown | ",
        "| encoder | ",
        "Objective `masked`, 6 steps of 8 sequences",
        "16 (encoder)",
    ):
        assert said in card


def test_an_earlier_export_is_replaced_if_that_is_asked_for(
    train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = str(train_run(DENSE)), tmp_path / "mlm"
    assert main(["export", run, "--out", str(out)]) == 0
    (out / "config.json").write_text("changed")
    capsys.readouterr()
    assert main(["export", run, "--out", str(out)]) == 2
    assert capsys.readouterr().err.endswith(
        f"--out {out} holds an earlier export; choose another folder, or give --overwrite\n"
    )
    assert (out / "config.json").read_text() == "changed"
    assert main(["export", run, "--out", str(out), "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "eurobert"
    assert [path.name for path in tmp_path.iterdir()] == ["mlm"]


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_what_is_no_export_stays(
    flags: list[str], train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for out in (tmp_path, tmp_path / "thesis.txt"):
        assert main(["export", str(train_run(DENSE)), "--out", str(out), *flags]) == 2
        assert "is there already and no earlier export; choose another folder" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["years of work"]


def test_an_export_that_would_load_wrong_gets_no_name(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train_run(DENSE)
    right = native.state_of

    def wrong(*arguments: Any) -> dict[str, torch.Tensor]:
        state = right(*arguments)
        query, key = (f"model.layers.1.self_attn.{name}_proj.weight" for name in "qv")
        return state | {query: state[key], key: state[query]}

    monkeypatch.setattr(native, "state_of", wrong)
    with pytest.raises(CheckpointError, match=r"would load wrong: its logits differ from the run's by up to .*nothing"):
        exporting.export(folder, tmp_path / "out", None, print)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_gets_no_name(train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.make_tokenizer

    def wrong(*arguments: Any) -> Any:
        tokenizer = right(*arguments)
        tokenizer.backend_tokenizer.model.dropout = 1.0
        return tokenizer

    monkeypatch.setattr(exporting, "make_tokenizer", wrong)
    with pytest.raises(CheckpointError, match=r"would load wrong: transformers' tokenizer gives other ids to"):
        exporting.export(train_run(DENSE), tmp_path / "out", None, print)
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_named(train_run: TrainRun, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(train_run(DENSE), tmp_path / "run"))
    (path,) = folder.glob("checkpoints/step_00000006/mp_rank_00_model_states.pt")
    content = torch.load(path, weights_only=False)
    content["module"]["encoder.blocks.0.attention.output.weight"][0, 0] = float("nan")
    torch.save(content, path)
    run = exporting.open_run(folder, None, print)
    with pytest.raises(CheckpointError, match=r"not finite \(nan or inf\), such as encoder.blocks.0.attention.output"):
        exporting.load_model(run)


def test_what_cannot_be_exported_is_said(
    train_run: TrainRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train_run(cases.with_routing({}, {"name": "reference"}))
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "this router cannot be exported: routing.router.name is reference; what can is top_k, frozen," in said
    assert not (tmp_path / "out").exists() and not is_export(tmp_path)
