"""Reads quantised checkpoints of the hub's format by dequantising them: what transformers can on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_testbed.launcher.analyze.weights import SCALE
from moe_testbed.launcher.errors import CheckpointError

_READ = ("fp8", "mxfp4")
"""Methods whose weights transformers turns into plain ones while it loads them, with what our extra installs."""

_NO_EXPERTS = ("auto-round", "awq", "bitsandbytes", "gptq")
"""Methods by which transformers reads the weights of linear modules alone. The experts of a layer are one tensor in its
models, which is none, whatever is installed."""

_UNQUANTISED = "take an unquantised copy of the model (bfloat16)"

_PACKAGES = {
    **dict.fromkeys(_READ, "'moe-testbed[checkpoints]'"),
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel accelerate",
    "bitsandbytes": "bitsandbytes accelerate",
    "compressed-tensors": "compressed-tensors",
    "fbgemm_fp8": "fbgemm-gpu accelerate",
    "gptq": "gptqmodel optimum",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "torchao": "torchao",
    "vptq": "vptq accelerate",
}
"""What transformers needs for a method, as `pip install` takes it."""


def method_of(settings: Mapping[str, Any]) -> str | None:
    """Returns how config.json says that the weights are quantised; None if it says nothing of it."""
    quantisation = settings.get("quantization_config")
    if not isinstance(quantisation, Mapping):
        return None
    if quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit"):
        return "bitsandbytes"
    return str(quantisation.get("quant_method") or "an unnamed method")


def refuse_experts(name: str, method: str, names: Iterable[str]) -> None:
    """Raises CheckpointError if experts are quantised by a method by which transformers does not read experts.

    Args:
        names: names of the tensors in the checkpoint.
    """
    experts = sorted(key for key in names if ".experts." in key and SCALE.search(key))
    if experts and method in _NO_EXPERTS:
        raise CheckpointError(
            f"{name} has experts that are quantised by {method} ({experts[0]} and {len(experts) - 1} more), and "
            f"transformers reads experts that are quantised by {' or '.join(_READ)}; {_UNQUANTISED}"
        )


def remedy(method: str, error: Exception) -> str:
    """Returns what helps where a checkpoint of a method cannot be loaded."""
    if method in _READ and not isinstance(error, ImportError):
        return f"take config.json and weights from the same copy, or {_UNQUANTISED.removeprefix('take ')}"
    if method in _PACKAGES:
        return f"pip install {_PACKAGES[method]}, which transformers needs for it, or {_UNQUANTISED}"
    return f"{' and '.join(_READ)} are read, other methods where transformers has all it needs; {_UNQUANTISED}"


def dequantise(config: Any, method: str) -> None:
    """Makes a model's config tell transformers to dequantise the weights while it loads them, if it can.

    Kernels for quantised weights need a GPU, and those for gpt-oss go around the router's module.
    """
    if method in _READ:
        config.quantization_config = {**config.quantization_config, "dequantize": True}


@contextmanager
def cut_blocks(config: Any) -> Iterator[None]:
    """Lets transformers dequantise fp8 weights whose last block is cut off, as the 576 rows of DeepSeek-V3's
    `kv_a_proj_with_mqa` are in blocks of 128.

    By itself it takes the size of a block to be the number of rows by that of scales: it refuses 576 rows with 5
    scales, and 192 rows with 2 scales it would read in blocks of 96. Weights without scales, which it would take as
    they are, are refused.
    """
    quantisation = getattr(config, "quantization_config", None) or {}
    block = quantisation.get("weight_block_size")
    if quantisation.get("quant_method") != "fp8":
        yield
        return

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    convert, dequantize_one = Fp8Dequantize.convert, Fp8Dequantize._dequantize_one

    def with_scales(self: Any, input_dict: dict[str, Any], *args: Any, **options: Any) -> Any:
        for key, value in input_dict.items():
            first = value[0] if isinstance(value, list) else value
            if first.dtype == torch.float8_e4m3fn and f"{key.removesuffix('$')}_scale_inv" not in input_dict:
                raise ValueError(f"{key} is in float8 and has no weight_scale_inv")
        return convert(self, input_dict, *args, **options)

    def in_blocks(self: Any, quantized: Tensor, scales: Tensor, *args: Any, **options: Any) -> Any:
        rows, columns = quantized.shape[-2:]
        if not block or scales.ndim < 2 or quantized.dtype != torch.float8_e4m3fn:
            return dequantize_one(self, quantized, scales, *args, **options)
        blocks = (-(-rows // block[0]), -(-columns // block[1]))
        if tuple(scales.shape[-2:]) != blocks:
            raise ValueError(
                f"a weight of {rows} x {columns} has {' x '.join(map(str, scales.shape[-2:]))} scales; blocks of "
                f"{block[0]} x {block[1]} need {blocks[0]} x {blocks[1]}"
            )
        whole = quantized.new_zeros(*quantized.shape[:-2], blocks[0] * block[0], blocks[1] * block[1])
        whole[..., :rows, :columns] = quantized
        return dequantize_one(self, whole, scales, *args, **options)[..., :rows, :columns].contiguous()

    Fp8Dequantize.convert, Fp8Dequantize._dequantize_one = with_scales, in_blocks
    try:
        yield
    finally:
        Fp8Dequantize.convert, Fp8Dequantize._dequantize_one = convert, dequantize_one
