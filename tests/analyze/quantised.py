"""Quantises tiny checkpoints as they are published, and says number by number what their weights are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.analyze import models

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the codes of e2m1 (OCP Microscaling Formats 1.0, table 5)."""


def read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, **values: Any) -> None:
    """Sets keys of config.json; None takes one out."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def save_fp8(name: str, folder: Path, block: int) -> tuple[Path, Path]:
    """Writes a model as DeepSeek publishes it, and beside it what its weights are in bfloat16; returns both folders."""
    model = models.make_model(name).to(torch.bfloat16)
    published, plain = models.save(model, folder / "published"), models.save(model, folder / "plain")
    weights, expected = read_weights(published), read_weights(plain)
    for key, weight in list(weights.items()):
        if not key.endswith("proj.weight") and "proj_with_mqa" not in key:
            continue
        rows, columns = weight.shape
        scales = torch.rand(-(-rows // block), -(-columns // block)) * 0.01
        codes = (torch.randn(rows, columns) * 50).to(torch.float8_e4m3fn)
        weights[key], weights[f"{key}_scale_inv"] = codes, scales
        values = codes.float().tolist()
        for i in range(rows):
            for j in range(columns):
                values[i][j] *= scales[i // block, j // block].item()
        expected[key] = torch.tensor(values).bfloat16()
    write_weights(published, weights)
    write_weights(plain, expected)
    quantisation = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    set_config(published, quantization_config=quantisation | {"weight_block_size": [block, block]})
    return published, plain


def save_mxfp4(folder: Path) -> tuple[Path, Path]:
    """Writes a model as gpt-oss is published, and beside it what its weights are in bfloat16; returns both folders."""
    model = models.make_model("gpt_oss", intermediate_size=32).to(torch.bfloat16)
    published, plain = models.save(model, folder / "published"), models.save(model, folder / "plain")
    weights, expected = read_weights(published), read_weights(plain)
    for key, weight in list(weights.items()):
        if not key.endswith(("gate_up_proj", "down_proj")):
            continue
        E, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (E, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(115, 122, (E, outputs, inputs // 32), dtype=torch.uint8)
        del weights[key]
        weights[f"{key}_blocks"], weights[f"{key}_scales"] = blocks, scales
        values = torch.empty(E, inputs, outputs)
        for e in range(E):
            for o in range(outputs):
                row = [
                    FP4[code] * 2.0 ** (scale - 127)
                    for of_block, scale in zip(blocks[e, o].tolist(), scales[e, o].tolist(), strict=True)
                    for byte in of_block
                    for code in (byte & 15, byte >> 4)
                ]
                values[e, :, o] = torch.tensor(row)
        expected[key] = values.bfloat16()
    write_weights(published, weights)
    write_weights(plain, expected)
    set_config(published, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return published, plain
