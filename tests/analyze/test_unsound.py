"""Checkpoints of others that are not sound: every one is refused with the place and the whole reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_testbed.launcher.analyze.families import FAMILIES
from moe_testbed.launcher.analyze.hub_config import refuse_other_formats, refuse_unroutable
from moe_testbed.launcher.analyze.hub_model import load_hub_model
from moe_testbed.launcher.analyze.passages import Tokens, cut_passages
from moe_testbed.launcher.analyze.recorder import Recorder
from moe_testbed.launcher.errors import CheckpointError
from tests.analyze import models
from tests.analyze.quantised import read_weights, set_config, write_weights

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.make_model("deepseek_v3"), tmp_path_factory.mktemp("models") / "v3")


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as refused:
        load_hub_model(str(folder), options.get("tokenizer"), "auto", torch.device("cpu"))
    said = str(refused.value)
    assert "\n" not in said and len(said) < 1000
    return said


def put(value: float, *place: int | slice) -> Callable[[Tensor], None]:
    def change(tensor: Tensor) -> None:
        tensor[place] = value

    return change


@pytest.mark.parametrize(
    "name, key, change, said",
    [
        ("mixtral", "layers.1.block_sparse_moe.gate.weight", put(NAN, slice(None)), "the router of layer 1 ("),
        ("gpt_oss", "layers.1.mlp.router.bias", put(-INF, 3), "the bias of the router of layer 1 ("),
        (
            "deepseek_v3",
            "layers.1.mlp.gate.e_score_correction_bias",
            put(NAN, 0),
            "the selection bias of the router of",
        ),
        ("mixtral", "layers.0.block_sparse_moe.experts.5.w2.weight", put(INF, 2, 7), "expert 5 of layer 0 ("),
        ("gpt_oss", "layers.1.mlp.experts.down_proj", put(NAN, 6, 0, 0), "expert 6 of layer 1 ("),
        ("mixtral", "layers.1.self_attn.q_proj.weight", put(NAN, 0, 0), "model.layers.1.self_attn.q_proj.weight;"),
        ("mixtral", "model.embed_tokens.weight", put(INF, 4), "model.embed_tokens.weight;"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_not_finite_are_refused_by_name(
    name: str, key: str, change: Callable[[Tensor], None], said: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = models.save(models.make_model(name).to(dtype), tmp_path / "model")
    weights = read_weights(folder)
    change(weights[next(found for found in weights if key in found or key.replace("block_sparse_moe", "mlp") in found)])
    write_weights(folder, weights)
    start = f"{folder} has damaged weights, which are not finite (nan or inf): {said}"
    assert refusal(folder).startswith(start)


def test_many_damaged_weights_are_counted(tmp_path: Path) -> None:
    folder = models.save(models.make_model("mixtral"), tmp_path / "model")
    weights = read_weights(folder)
    for key, tensor in weights.items():
        if "layers.0." in key and "experts" in key and ("w2" in key or "down_proj" in key):
            tensor[:] = NAN
    write_weights(folder, weights)
    said = refusal(folder)
    assert said.count("expert ") == 3
    assert ", and 5 more; take another copy, or repeat the conversion that made this one" in said


def test_finite_weights_whose_numbers_overflow_are_refused() -> None:
    model = models.make_model("mixtral")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e38)
    passages = cut_passages(models.make_documents(per_domain=1, characters=20), 6, per_domain=1)
    recorder = Recorder(
        model, FAMILIES["mixtral"], passages, Tokens(models.make_tokenizer(), 6), 5, torch.device("cpu")
    )
    with pytest.raises(
        CheckpointError, match=r"losses are not finite on \d of 4 passages: its numbers overflow in torch"
    ):
        recorder.run()


def test_shares_of_sigmoids_that_all_underflow_are_shares() -> None:
    shares = FAMILIES["deepseek_v3"].probabilities(torch.tensor([[-200.0, -200.0, -300.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


@pytest.mark.parametrize(
    "name, changes, said",
    [
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok is 9, and must be 1 to 8 (num_local_experts)"),
        ("olmoe", {"num_experts_per_tok": 0}, "num_experts_per_tok is 0, and must be 1 to 8 (num_experts)"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is None, and must be 1 to 8"),
        ("qwen2_moe", {"num_experts": 0}, "num_experts is 0, and must be a whole number of at least 1"),
        ("deepseek_v3", {"n_group": 3}, "n_group is 3, and must divide 8 (n_routed_experts)"),
        ("deepseek_v3", {"n_group": 0}, "n_group is 0, and must divide 8"),
        ("deepseek_v3", {"n_group": 8}, "a group is chosen by its two best experts"),
        ("deepseek_v3", {"topk_group": 5}, "topk_group is 5, and must be 1 to 4 (n_group)"),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 3}, "more than the 2 experts of topk_group"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax', and a router of deepseek_v3 has 'sig"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy', and a router of deepseek_v3 has 'noaux_"),
        ("deepseek_v2", {"topk_method": "best"}, "topk_method is 'best', and a router of deepseek_v2 has 'greedy' or"),
        ("deepseek_v2_groups", {"n_group": None}, "n_group is None, and must divide 8"),
    ],
)
def test_a_config_that_cannot_route_is_refused(name: str, changes: dict[str, Any], said: str) -> None:
    config = models.make_model(name).config
    refuse_unroutable("sound", config)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(CheckpointError) as refused:
        refuse_unroutable("model", config)
    assert str(refused.value).startswith("model: its config.json cannot be right, ")
    assert said in str(refused.value)


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    set_config(target, **changes)
    return target


def test_what_a_config_says_wrong_is_told_whole(deepseek: Path, tmp_path: Path) -> None:
    said = refusal(copied(deepseek, tmp_path / "a", model_type=None))
    assert said.endswith("a: its config.json has no model_type; take the one that was published")
    assert "vocab_size" in refusal(copied(deepseek, tmp_path / "b", vocab_size="many"))
    said = refusal(copied(deepseek, tmp_path / "c", vocab_size=77))
    assert "weight is [35, 32] in the file and [77, 32] by config.json (and 1 more); take both from" in said


def test_code_that_comes_with_a_checkpoint_is_not_run(deepseek: Path, tmp_path: Path) -> None:
    folder = copied(
        deepseek, tmp_path / "a", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    )
    set_config(folder, _attn_implementation="somebody/kernels")
    (folder / "own.py").write_text("raise SystemExit('run')")
    load_hub_model(str(folder), None, "auto", torch.device("cpu"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": [None, "own.Tokenizer"]}}))
    assert "no code of a checkpoint is run): give another one with --tokenizer" in refusal(folder)


def test_a_pickle_that_names_code_is_not_read(deepseek: Path, tmp_path: Path) -> None:
    folder = copied(deepseek, tmp_path / "a")
    weights = read_weights(folder)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    load_hub_model(str(folder), None, "auto", torch.device("cpu"))
    torch.save(weights | {"evil": pytest.raises}, folder / "pytorch_model.bin")
    assert "cannot be loaded (" in refusal(folder)


def test_files_that_are_not_the_weights_are_named(deepseek: Path, tmp_path: Path) -> None:
    pointer = copied(deepseek, tmp_path / "pointer")
    (pointer / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    assert f"model.safetensors is a pointer of git lfs, not the weights; run `git lfs pull` in {pointer}" in refusal(
        pointer
    )
    shards = copied(deepseek, tmp_path / "shards")
    index = {"weight_map": {key: f"model-0000{n % 2}.safetensors" for n, key in enumerate(read_weights(shards))}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    (shards / "model.safetensors").rename(shards / "model-00001.safetensors")
    said = (
        "shards is not whole: 1 of 2 files of weights are missing, such as model-00000.safetensors; download it again"
    )
    assert refusal(shards).endswith(said)
    (shards / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read ('weight_map')" in refusal(shards)


def test_other_formats_are_named(tmp_path: Path) -> None:
    adapter, gguf = tmp_path / "adapter", tmp_path / "gguf"
    for folder in (adapter, gguf):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for path, said in (
        (adapter, "holds an adapter of PEFT"),
        (gguf, "format GGUF, which is not read"),
        (gguf / "model-Q4_K_M.gguf", "is a file; give the folder of the checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=said):
            refuse_other_formats(path)


def test_a_tokenizer_that_cannot_be_loaded_is_told_whole(deepseek: Path, tmp_path: Path) -> None:
    folder = copied(deepseek, tmp_path / "a")
    (folder / "tokenizer.json").write_text("{}")
    said = refusal(folder)
    assert "has no tokenizer that can be loaded (" in said and said.endswith(": give another one with --tokenizer")
    assert not said.split(" (", 1)[1].split("): ")[0].endswith((":", "of"))
