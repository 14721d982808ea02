"""Trainings that start from an export: what they start from is what the exported run has, to the bit."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import language_model, setting_on
from moe_testbed.launcher.export.export import export
from moe_testbed.launcher.export.folder import file_digest
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.train.stages.parent import find_parent
from moe_testbed.launcher.train.stages.start import start_from
from tests.distributed import corpus
from tests.export import cases
from tests.processes.python import run_python
from tests.train.results import read_metrics, read_weights

TrainRun = Callable[[Mapping[str, Any]], Path]
Train = Callable[..., "subprocess.CompletedProcess[str]"]

DENSE = cases.dense(cases.ENCODER)
# Everything that keeps state of its own beside the weights.
STATEFUL = {"load_balancing_loss": {"coefficient": 0.1, "scope": "global_batch", "estimator": "previous"}}
STATEFUL |= {"loss_free_bias": {"update_rate": 0.1}}
PARENTS: dict[str, Any] = {
    "dense": DENSE,
    "untied": cases.dense(cases.ENCODER, embeddings="separate"),
    "experts": cases.with_routing(cases.ENCODER, {"name": "noisy_top_k"}, STATEFUL),
    "hash": cases.with_routing(cases.ENCODER, {"name": "hash"}),
    "seq2seq": cases.with_routing(cases.BOTH, {"name": "top_k"}, STATEFUL),
    "half_precision": {**DENSE, "training": {"precision": "bfloat16"}},
}


def child_of(parts: Mapping[str, Any], run: Path, **model: Any) -> dict[str, Any]:
    """An encoder-decoder of the same sizes and routing that starts from a run, or from an export."""
    sizes = {**parts["model"], "architecture": "encoder_decoder", **model}
    start = {"start": {"encoder": {"run": str(run)}}}
    return {**parts, "model": sizes, "objective": {"name": "denoising", "rate": 0.3}, **start}


@pytest.fixture
def train(own_data: dict[str, Any], tmp_path: Path) -> Train:
    """``train(parts, name)``: trains in a folder of this name, and returns how the process has ended."""

    def train(parts: Mapping[str, Any], name: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(corpus.make_experiment(own_data, **parts)))
        arguments = ["train", str(tmp_path / f"{name}.yaml"), "--run-dir", str(tmp_path / name)]
        return run_python("-m", "moe_testbed.launcher", *arguments)

    return train


@pytest.fixture
def exported(train_run: TrainRun, tmp_path: Path) -> Path:
    """The export of a dense encoder."""
    export(train_run(DENSE), tmp_path / "mlm", None, print)
    return tmp_path / "mlm"


@pytest.mark.parametrize(
    "name", [name if name in ("dense", "experts") else pytest.param(name, marks=pytest.mark.slow) for name in PARENTS]
)
def test_the_first_weights_and_all_losses_are_those_of_a_start_from_the_run(
    name: str,
    train_run: TrainRun,
    train: Train,
    own_data: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train_run(PARENTS[name])
    export(run, tmp_path / "exported", None, print)
    first = []
    for parent in (run, tmp_path / "exported"):
        config = ExperimentConfig.model_validate(corpus.make_experiment(own_data, **child_of(PARENTS[name], parent)))
        store = build_store(config.data.mix, Path(config.data.cache_dir), print)
        model = language_model(config, store.vocab_size, setting_on(config, store))
        found = find_parent(config, tmp_path / "none", store)
        assert found is not None and found.step == 6
        if parent != run:
            monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("an export is read without pickle"))
        start_from(model, config, found, found.state(), store.vocab_size)
        first.append(model.state_dict())
    monkeypatch.undo()
    assert first[0].keys() == first[1].keys()
    assert [key for key, value in first[0].items() if not torch.equal(value, first[1][key])] == []
    for label, parent in (("from_run", run), ("from_export", tmp_path / "exported")):
        train(child_of(PARENTS[name], parent), label).check_returncode()
    losses = [
        [(line["step"], line["kind"], line["cross_entropy"]) for line in read_metrics(tmp_path / label)]
        for label in ("from_run", "from_export")
    ]
    assert losses[0] == losses[1]
    weights = [read_weights(tmp_path / label) for label in ("from_run", "from_export")]
    assert [key for key, value in weights[0].items() if not torch.equal(value, weights[1][key])] == []
    ledgers = [RunFolder(tmp_path / label).read_summary().ledger for label in ("from_run", "from_export")]
    assert ledgers[0] == ledgers[1] and ledgers[1] is not None
    of_parent = RunFolder(run).read_summary().ledger
    assert of_parent is not None and ledgers[1]["inherited_flops"] == of_parent["flops"] > 0


def test_what_an_export_does_not_tell_is_not_known(exported: Path, train: Train, tmp_path: Path) -> None:
    record = json.loads((exported / "testbed.json").read_text())
    (exported / "testbed.json").write_text(json.dumps({**record, "ledger": None}))
    done = train(child_of(DENSE, exported), "child")
    done.check_returncode()
    assert f"{exported} does not tell what its training has taken" in done.stderr
    ledger = RunFolder(tmp_path / "child").read_summary().ledger
    assert ledger is not None and ledger["flops"] > 0
    assert ledger["inherited_flops"] is None and ledger["inherited_layer_units"] is None


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def with_other_shape(folder: Path) -> None:
    """As if somebody had put another model in, and its digest."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state["model.norm.weight"] = torch.ones(8)
    save_file(state, file)
    record = json.loads((folder / "testbed.json").read_text())
    (folder / "testbed.json").write_text(json.dumps({**record, "files": {file.name: file_digest(file)}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda folder: damage(folder / "model.safetensors"),
            "is not what was exported: it is damaged, or was changed",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "/model.safetensors is missing; export the run anew"),
        (lambda folder: (folder / "testbed.json").unlink(), "is no folder of a run and no export"),
        (lambda folder: (folder / "testbed.json").write_text('{"format": 1}'), "its format is 1 and not 2"),
        (with_other_shape, "has no encoder.final_norm.weight of shape (16,)"),
    ],
    ids=["damaged", "missing", "none", "older", "another shape"],
)
def test_a_folder_that_is_no_whole_export_is_refused(
    change: Callable[[Path], Any], message: str, exported: Path, train: Train, tmp_path: Path
) -> None:
    change(exported)
    refused(train(child_of(DENSE, exported), "child"), message)
    assert not read_metrics_if_any(tmp_path / "child")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": {"hidden_size": 32}}, "start.encoder.run has model.hidden_size 16, and this model 32; make them"),
        ({"model": {"encoder": {"num_layers": 3}}}, "does not fit this model's: encoder.blocks.2."),
        ({"model": {"encoder": {"num_layers": 1}}}, "does not fit this model's, which has no encoder.blocks.1."),
        ({"vocab_size": 640}, "has the tokenizer of the mix 'tiny' as it was built then, and not that of 'tiny'"),
    ],
    ids=["width", "more layers", "fewer layers", "tokenizer"],
)
def test_an_encoder_that_does_not_fit_is_refused(
    parts: dict[str, Any], message: str, exported: Path, own_data: dict[str, Any], train: Train, tmp_path: Path
) -> None:
    child = child_of(DENSE, exported, **parts.get("model", {}))
    if "vocab_size" in parts:
        mix = {**own_data["mix"], "vocab_size": parts["vocab_size"]}
        child["data"] = {"mix": mix, "cache_dir": str(tmp_path / "cache")}
    refused(train(child, "child"), message)
    assert not read_metrics_if_any(tmp_path / "child")


def test_an_export_without_an_encoder_is_refused(train_run: TrainRun, train: Train, tmp_path: Path) -> None:
    export(train_run(cases.dense({})), tmp_path / "causal", None, print)
    message = "has model.architecture causal, without an encoder; start from another one"
    refused(train(child_of(DENSE, tmp_path / "causal"), "child"), message)


def test_a_suite_says_so_before_anything_is_trained(exported: Path, own_data: dict[str, Any], tmp_path: Path) -> None:
    child = corpus.make_experiment(own_data, **child_of(DENSE, exported, encoder={"num_layers": 3}))
    (tmp_path / "child.yaml").write_text(yaml.safe_dump(child))
    (tmp_path / "suite.yaml").write_text("name: suite\nexperiment: child.yaml\nruns: {child: {}}\n")
    arguments = ["compare", str(tmp_path / "suite.yaml"), "--runs-dir", str(tmp_path / "runs")]
    refused(
        run_python("-m", "moe_testbed.launcher", *arguments),
        f"child-seed1 is to start from {exported}, but encoder.blocks.2.attention_norm.weight has shape (16,) in the "
        "one and is missing in the other",
    )


def test_a_child_of_an_export_that_has_changed_is_stale(
    exported: Path, train_run: TrainRun, train: Train, tmp_path: Path
) -> None:
    train(child_of(DENSE, exported), "child").check_returncode()
    before = read_weights(tmp_path / "child")
    # The same weights once more are the same ones.
    export(train_run(DENSE), exported, None, print, overwrite=True)
    again = train(child_of(DENSE, exported), "child")
    again.check_returncode()
    assert "is finished already" in again.stderr
    export(train_run({**DENSE, "seed": 9}), exported, None, print, overwrite=True)
    message = (
        f"{tmp_path / 'child'} has started from {exported}, which has been exported anew since, with other weights"
    )
    refused(train(child_of(DENSE, exported), "child"), message)
    assert all(torch.equal(value, before[key]) for key, value in read_weights(tmp_path / "child").items())


def refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert sum(line.startswith("moe-testbed: ") for line in done.stderr.splitlines()) == 1


def read_metrics_if_any(run_dir: Path) -> list[Any]:
    return read_metrics(run_dir) if (run_dir / "metrics.jsonl").exists() else []
