"""Our own runs, rebuilt from their folders."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
import yaml

from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.tokens.tokenizer import load_tokenizer
from moe_testbed.launcher.analyze import own_run
from moe_testbed.launcher.analyze.request import Request
from moe_testbed.launcher.analyze.run_analysis import RunAnalysis
from moe_testbed.launcher.config.mix import load_mix
from moe_testbed.launcher.errors import CheckpointError, ConfigError
from moe_testbed.launcher.ranks.rendezvous import choose_device
from moe_testbed.launcher.run import ownership

KINDS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "capacity": {"model": {"moe": {"dispatch": "capacity", "capacity_factor": 1.0}}},
    "bfloat16": {"training": {"precision": "bfloat16"}},
    "reference": {"routing": {"router": {"name": "reference"}, "balance": "none"}},
}


def last(folder: Path, kind: str = "evaluations") -> dict[str, Any]:
    with np.load(sorted((folder / kind).glob("step_*.npz"))[-1]) as arrays:
        return {name: arrays[name] for name in arrays.files}


def request(mix: Path, **options: Any) -> Request:
    return Request(mix=load_mix(mix), device=choose_device("cpu"), **options)


@pytest.fixture(scope="module")
def runs(train_run: Callable[..., Path]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            parts = {part: dict(options) for part, options in KINDS[kind].items()}
            if "model" in parts:
                moe = {"num_experts": 8, "top_k": 2, "expert_hidden_size": 8}
                parts["model"] = {"moe": {**moe, **parts["model"]["moe"]}}
            made[kind] = train_run(kind, **parts)
        return made[kind]

    return run


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in ("capacity", "bfloat16") else []) for kind in KINDS]
)
def test_its_own_mix_gives_the_counts_of_its_last_evaluation(
    kind: str, runs: Callable[[str], Path], own_mix: Path
) -> None:
    folder = runs(kind)
    result = RunAnalysis(request(own_mix))(str(folder))
    expected = last(folder)
    assert result.evaluation.step == int(expected["step"]) == 6
    assert set(result.evaluation.arrays()) == set(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(result.evaluation.arrays()[name], values, err_msg=name)
    with np.load(folder / "analysis.npz") as arrays:
        assert set(result.ablation.arrays()) == set(arrays.files)
        for name in arrays.files:
            np.testing.assert_array_equal(result.ablation.arrays()[name], arrays[name], err_msg=name)
    assert result.manifest.content == json.loads((folder / "manifest.json").read_text())


@pytest.mark.slow
def test_experts_of_several_ranks_are_joined(train_run: Callable[..., Path], own_mix: Path) -> None:
    folder = train_run(
        "two_ranks", 2, parallel={"expert_parallel_size": 2}, training={"micro_batch_size": 4, "zero_stage": 1}
    )
    assert len(list((folder / "checkpoints").glob("*/layer_*_expert_*"))) == 2 * 8
    result, expected = RunAnalysis(request(own_mix))(str(folder)), last(folder)
    np.testing.assert_array_equal(result.evaluation.counts_top_k_YDE, expected["counts_top_k_YDE"])
    np.testing.assert_allclose(result.evaluation.sequence_loss_N, expected["sequence_loss_N"], rtol=1e-6)


def test_another_mix_is_read_in_the_runs_own_tokens(runs: Callable[[str], Path], alphabets_mix: Path) -> None:
    folder = runs("top_k")
    result = RunAnalysis(request(alphabets_mix, sequences_per_domain=3, examined_sequences=0))(str(folder))
    arrays = result.evaluation.arrays()
    assert arrays["domains"].tolist() == ["latin", "greek", "digits", "hebrew"]
    assert arrays["tokens_D"].tolist() == [3 * 16] * 4
    assert arrays["counts_top_k_YDE"].sum(2).tolist() == [[3 * 16 * 2] * 4] * 2
    assert result.ablation is None
    assert result.manifest.content["domains"]["hebrew"]["splits"]["all"]["documents"] == 6


def test_a_store_in_memory_has_every_document_under_its_domain(runs: Callable[[str], Path], tmp_path: Path) -> None:
    run = own_run.open_run(runs("top_k"), None, print)
    texts = {"one": ["abc", "de fg"], "two": ["אבג"]}
    documents = {name: [Document(text, "") for text in of_domain] for name, of_domain in texts.items()}
    store = own_run.store_of(documents, run, tmp_path)
    tokenizer = load_tokenizer(run.store.tokenizer_path)
    number = 0
    for name, of_domain in texts.items():
        region = store.region("validation", name)
        assert region.first_document == number
        for text in of_domain:
            first, end = store.document_starts[number : number + 2]
            assert tokenizer.decode(store.tokens[first : end - 1].tolist()) == text
            number += 1
        assert region.end_document == number
    assert len(store.tokens_of("validation", "one")) + len(store.tokens_of("validation", "two")) == len(store.tokens)
    assert len(store.tokens_of("train", "one")) == 0


def test_labels_are_known_of_the_own_mix_only(runs: Callable[[str], Path], alphabets_mix: Path) -> None:
    with pytest.raises(ConfigError, match=r"router reference\) reads the domain of every token.*give its own mix"):
        RunAnalysis(request(alphabets_mix))(str(runs("reference")))


def test_what_a_run_cannot_do_is_said(runs: Callable[[str], Path], own_mix: Path, alphabets_mix: Path) -> None:
    folder = str(runs("top_k"))
    with pytest.raises(ConfigError, match=r"--tokenizer is for models of the hub's format"):
        RunAnalysis(request(own_mix, tokenizer="x"))
    with pytest.raises(ConfigError, match=r"--sequence-length is 32, but .* sequences of 16; give at most that"):
        RunAnalysis(request(own_mix, sequence_length=32))(folder)
    with pytest.raises(ConfigError, match=r"'tiny' is the run's own mix.*--split train, validation, tuning"):
        RunAnalysis(request(own_mix, split="all"))(folder)
    with pytest.raises(DataError, match=r"for evaluation only and has no split 'validation': take the split 'all'"):
        RunAnalysis(request(alphabets_mix, split="validation"))(folder)


def test_broken_runs_are_said(runs: Callable[[str], Path], own_mix: Path, tmp_path: Path) -> None:
    analysis = RunAnalysis(request(own_mix))

    def copy() -> Path:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return Path(shutil.copytree(runs("top_k"), tmp_path / "run"))

    folder = copy()
    next((folder / "checkpoints").glob("*/mp_rank_00*")).write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"run has no whole checkpoint; continue its training"):
        analysis(str(folder))

    folder = copy()
    # Whole by its size and its directory, but with other content.
    path = next((folder / "checkpoints").glob("*/mp_rank_00*"))
    content = path.read_bytes()
    path.write_bytes(content[:1000] + b"?" * 400 + content[1400:])
    with pytest.raises(CheckpointError, match=r"run has no whole checkpoint; continue its training"):
        analysis(str(folder))

    # Sound, but not of torch.
    with ZipFile(path, "w") as archive:
        archive.writestr("content", "other")
    mark = json.loads((path.parent / "complete.json").read_text())
    mark["files"][path.name] = path.stat().st_size
    (path.parent / "complete.json").write_text(json.dumps(mark))
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt cannot be read"):
        analysis(str(folder))

    folder = copy()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"]["hidden_size"] = 32
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"step_00000006 does not fit .*config.yaml"):
        analysis(str(folder))

    folder = copy()
    (folder / "manifest.json").write_text('{"domains": {}}')
    with pytest.raises(CheckpointError, match=r"was trained on other data than"):
        analysis(str(folder))

    folder = copy()
    config["model"] |= {"hidden_size": 16, "dense_baseline": True}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=r"is a dense baseline: it has no experts"):
        analysis(str(folder))


def test_a_run_of_another_user_is_read_as_data(
    runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(runs("top_k"), tmp_path / "run"))
    monkeypatch.setattr(ownership, "_owner", lambda path, follow: 54_321)
    run = own_run.open_run(folder, None, print)
    own_run.load_model(run, None, own_run.Ranks(0, 1, torch.device("cpu"), None))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["routing"]["balance"] = {"evil.py:Balancer": {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=r"belongs to user 54321.*--trust"):
        own_run.open_run(folder, None, print)
    with pytest.raises(ConfigError, match="it ran"):
        own_run.open_run(folder, None, print, trust=True)


def test_damaged_weights_of_a_run_are_named(runs: Callable[[str], Path]) -> None:
    run = own_run.open_run(runs("top_k"), None, print)
    path = next(run.checkpoint.glob("layer_1_expert_3_*"))
    state = torch.load(path, weights_only=True)
    for tensor in state.values():
        tensor.view(-1)[0] = float("nan")
    target = Path(shutil.copytree(run.checkpoint, run.checkpoint.parent / "damaged"))
    torch.save(state, target / path.name)
    damaged = dataclasses.replace(run, checkpoint=target)
    try:
        with pytest.raises(CheckpointError, match=r"not finite \(nan or inf\): expert 3 of layer 1 \(.*remove it, and"):
            own_run.load_model(damaged, None, own_run.Ranks(0, 1, torch.device("cpu"), None))
    finally:
        shutil.rmtree(target)


def test_weights_can_be_read_in_another_precision(runs: Callable[[str], Path]) -> None:
    run = own_run.open_run(runs("top_k"), None, print)
    analysis_ranks = own_run.Ranks(0, 1, torch.device("cpu"), None)
    assert own_run.load_model(run, None, analysis_ranks).embedding.weight.dtype == torch.float32
    assert own_run.load_model(run, torch.bfloat16, analysis_ranks).embedding.weight.dtype == torch.bfloat16
