"""Quantised checkpoints: those that are read, against their weights worked out number by number; why others are not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_testbed.launcher.analyze import hub_quantised
from moe_testbed.launcher.analyze.hub_model import load_hub_model
from moe_testbed.launcher.errors import CheckpointError
from tests.analyze import models, quantised


def load(folder: Path) -> Any:
    return load_hub_model(str(folder), None, "auto", torch.device("cpu")).model


def needs_accelerate(method: str) -> None:
    if method == "fp8":
        pytest.importorskip("accelerate")


# Blocks of 12 and 24 are cut off at the ends of weights: 32 rows have as many scales as 2 blocks of 16 would have.
@pytest.mark.parametrize(
    "name, block", [("deepseek_v3", 16), ("deepseek_v3", 12), ("qwen3_moe", 24), ("gpt_oss", 32)], ids=str
)
def test_quantised_weights_are_read_as_what_they_are(
    name: str, block: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = "mxfp4" if name == "gpt_oss" else "fp8"
    needs_accelerate(method)
    published, plain = (
        quantised.save_mxfp4(tmp_path) if method == "mxfp4" else quantised.save_fp8(name, tmp_path, block)
    )
    found, expected = load(published).state_dict(), load(plain).state_dict()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=0, atol=0, msg=key)
    assert f"published: weights quantised by {method} are read as bfloat16" in capsys.readouterr().err


def test_weights_in_float8_without_their_scales_are_refused(tmp_path: Path) -> None:
    needs_accelerate("fp8")
    published, _ = quantised.save_fp8("qwen3_moe", tmp_path, 16)
    weights = quantised.read_weights(published)
    quantised.write_weights(published, {key: w for key, w in weights.items() if "q_proj.weight_scale" not in key})
    with pytest.raises(CheckpointError, match=r"float8 and has no weight_scale_inv.*q_proj.*from the same copy"):
        load(published)


def test_scales_that_are_not_of_the_blocks_are_refused(tmp_path: Path) -> None:
    needs_accelerate("fp8")
    published, _ = quantised.save_fp8("qwen3_moe", tmp_path, 16)
    quantisation = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    quantised.set_config(published, quantization_config=quantisation)
    with pytest.raises(CheckpointError, match=r"has \d x \d scales; blocks of 8 x 8 need \d x \d.*from the same copy"):
        load(published)


@pytest.mark.parametrize("quantisation", [None, {"quant_method": "modelopt"}])
def test_quantised_weights_that_the_config_does_not_tell_of_are_refused(quantisation: Any, tmp_path: Path) -> None:
    published, _ = quantised.save_fp8("qwen3_moe", tmp_path, 16)
    quantised.set_config(published, quantization_config=quantisation)
    with pytest.raises(
        CheckpointError, match=r"has quantised weights \(.*weight_scale_inv and \d+ more\).*unquantised"
    ):
        load(published)


PACKED = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "bitsandbytes": ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"),
    "bitsandbytes in 8 bits": ("weight", "SCB"),
}
"""What stands in a checkpoint in place of a quantised weight."""


@pytest.mark.parametrize("told", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("packed", PACKED)
def test_experts_quantised_as_transformers_does_not_read_them_are_refused_whatever_is_installed(
    packed: str, told: bool, tmp_path: Path
) -> None:
    """No package is named that would not help, and nothing is to be downloaded again."""
    method = packed.split()[0]
    folder = models.save(models.make_model("qwen3_moe"), tmp_path / "model")
    weights = quantised.read_weights(folder)
    for key in [key for key in weights if ".experts." in key]:
        weight = weights.pop(key)
        for part in PACKED[packed]:
            name = key.removesuffix("weight") + part
            weights[name] = torch.zeros(len(weight), 1, dtype=torch.uint8) if part == "weight" else torch.zeros(3)
    quantised.write_weights(folder, weights)
    bits = {"load_in_8bit": True} if "8 bits" in packed else {"load_in_4bit": True}
    quantised.set_config(
        folder, quantization_config={"quant_method": method, **(bits if method == "bitsandbytes" else {"bits": 4})}
    )
    if not told:
        quantised.set_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    said = str(refused.value)
    assert said.endswith("take an unquantised copy of the model (bfloat16)")
    assert (f"has experts that are quantised by {method} (" if told else "has quantised weights (") in said
    assert "again" not in said and "pip" not in said


@pytest.mark.parametrize(
    "quantisation, method, package",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq", "gptqmodel optimum"),
        ({"quant_method": "awq", "bits": 4}, "awq", "gptqmodel accelerate"),
        ({"load_in_4bit": True}, "bitsandbytes", "bitsandbytes accelerate"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "compressed-tensors"),
    ],
)
def test_what_other_methods_need_is_named(
    quantisation: dict[str, Any], method: str, package: str, checkpoint: Path, tmp_path: Path
) -> None:
    if method.replace("-", "_") in sys.modules:
        pytest.skip("it is installed")
    folder = models.save(models.make_model("mixtral"), tmp_path / "model")
    quantised.set_config(folder, quantization_config=quantisation)
    with pytest.raises(CheckpointError) as refused:
        load(folder)
    said = str(refused.value)
    assert f"whose weights are quantised by {method}, cannot be loaded (" in said
    assert said.endswith(
        f"pip install {package}, which transformers needs for it, or take an unquantised copy of the model (bfloat16)"
    )
    assert "download it again" not in said


def test_without_accelerate_the_extra_is_named() -> None:
    said = hub_quantised.remedy("fp8", ImportError("requires accelerate"))
    assert said.startswith("pip install 'moe-testbed[checkpoints]', which transformers needs for it, or take an")
