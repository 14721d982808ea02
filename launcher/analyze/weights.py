"""Refuses weights that are not those of a sound model: not the config's, not whole, or not finite."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_testbed.launcher.errors import CheckpointError

SCALE = re.compile(r"(weight_scale\w*|input_scale|qweight|qzeros|scales|weight_packed|absmax|quant_map|SCB|_blocks)$")
"""Ends of the names of what stands beside or in place of quantised weights."""
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_POINTER = b"version https://git-lfs"
_READ_HERE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLACES = 3  # so many are named


def refuse_damaged_files(folder: Path) -> None:
    """Raises CheckpointError if a file of weights in a folder is missing, cut off, or a pointer to one elsewhere.

    Only the heads of the files are read.
    """
    from safetensors import SafetensorError, safe_open

    files = _files(folder)
    if missing := [path.name for path in files if not path.is_file()]:
        raise CheckpointError(
            f"{folder} is not whole: {len(missing)} of {len(files)} files of weights are missing, such as "
            f"{missing[0]}; download it again"
        )
    for path in files:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                raise CheckpointError(
                    f"{path} is a pointer of git lfs, not the weights; run `git lfs pull` in {folder}"
                )
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, framework="pt"):
                    pass
            except SafetensorError as error:
                raise CheckpointError(
                    f"{folder} cannot be loaded, {path.name} is cut off or damaged ({error}): download it again"
                ) from error


def names_in(folder: Path) -> list[str]:
    """Returns the names of the tensors in a folder's files of safetensors, of which only the heads are read."""
    from safetensors import safe_open

    names: list[str] = []
    for path in _files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                names += file.keys()
    return names


def _files(folder: Path) -> list[Path]:
    """Returns the files that transformers reads, also those that are not there; empty where it will find none."""
    for path in (folder / f"{name}{suffix}" for name in _WEIGHTS for suffix in ("", ".index.json")):
        if path.is_file():
            return [path] if path.suffix != ".json" else [folder / name for name in _shards(path)]
    return []


def _shards(index: Path) -> list[str]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({str(name) for name in shards.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read ({error}): download it again") from error


def refuse_unfitting(name: str, info: Mapping[str, Any]) -> None:
    """Raises CheckpointError if weights have other sizes than config.json says, are missing, or are quantised.

    Args:
        info: what transformers says of the loading, with sizes that do not match let pass.
    """
    if scales := sorted(key for key in info["unexpected_keys"] if SCALE.search(key)):
        raise CheckpointError(
            f"{name} has quantised weights ({scales[0]} and {len(scales) - 1} more), of which its config.json says "
            "nothing that transformers knows (quantization_config); take an unquantised copy of the model (bfloat16)"
        )
    for key, in_file, by_config in sorted(info["mismatched_keys"]):
        others = len(info["mismatched_keys"]) - 1
        raise CheckpointError(
            f"{name} cannot be loaded, its weights are not those of its config.json: {key} is {list(in_file)} in the "
            f"file and {list(by_config)} by config.json{f' (and {others} more)' if others else ''}; take both from the "
            "same copy"
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{name} is not whole: {len(missing)} weights are missing, such as {missing[0]}; download it again, or "
            "take both config.json and weights from the same copy"
        )


def refuse_not_finite(name: str, weights: Iterable[tuple[str, Tensor]], router: str, remedy: str) -> None:
    """Raises CheckpointError if a weight is infinite or not a number; names the routers, biases and experts.

    A tensor is looked at where it lies, and nothing of its size is made of it.

    Args:
        weights: names and tensors; a tensor of experts has one row for each.
        router: end of the names of routers among the modules.
    """
    damaged = [
        (key, tensor.detach())
        for key, tensor in weights
        if tensor.numel() and tensor.dtype in _READ_HERE and not _is_finite(tensor.detach())
    ]
    places = [place for key, tensor in damaged for place in _places(key, tensor, router)]
    if places:
        more = f", and {len(places) - _PLACES} more" if len(places) > _PLACES else ""
        raise CheckpointError(
            f"{name} has damaged weights, which are not finite (nan or inf): {', '.join(places[:_PLACES])}{more}; "
            f"{remedy}"
        )


def _is_finite(tensor: Tensor) -> bool:
    # The extremes of numbers with a nan among them are nan.
    return all(torch.isfinite(extreme).item() for extreme in torch.aminmax(tensor))


def _places(key: str, tensor: Tensor, router: str) -> Iterator[str]:
    """Yields what is damaged in one tensor, in words: of the experts, which lie in one tensor, one by one."""
    layer = re.search(r"(?:layers|blocks)\.(\d+)\.", key)
    where = f" of layer {layer[1]}" if layer else ""
    part, _, last = key.rpartition(".")
    expert = re.search(r"\.experts\.(\d+)\.", key)
    if layer and part.endswith(router):
        kind = {"weight": "the router", "e_score_correction_bias": "the selection bias of the router"}
        yield f"{kind.get(last, f'the {last} of the router')}{where} ({key})"
    elif expert:
        yield f"expert {expert[1]}{where} ({key})"
    elif part.endswith(".experts"):
        yield from (f"expert {e}{where} ({key})" for e, of_expert in enumerate(tensor) if not _is_finite(of_expert))
    else:
        yield key
