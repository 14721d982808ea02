"""What a rank runs that ranks.py starts; FUNCTION, ARGUMENTS, RANK, NUM_RANKS and FOLDER are its variables."""

from __future__ import annotations

import faulthandler
import gc
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def _load(file: str, name: str) -> Callable[..., Any]:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    function: Callable[..., Any] = getattr(module, name)
    return function


def main(function: tuple[str, str], arguments: tuple[Any, ...], rank: int, num_ranks: int, folder: str) -> None:
    """Joins the group, calls the function and writes its result, or the traceback."""
    # Imports have made 300,000 objects that stay; DeepSpeed collects garbage up to 8 times while it builds an engine.
    gc.freeze()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks), "GLOO_SOCKET_IFNAME": "lo"}
    with open(f"{folder}/{rank}.log", "wb") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    # A crash says where it was.
    faulthandler.enable()
    try:
        store = dist.FileStore(f"{folder}/store", num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        torch.save(_load(*function)(*arguments), f"{folder}/{rank}.result")
    except BaseException:
        Path(folder, f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}", encoding="utf-8")
        raise


main(FUNCTION, ARGUMENTS, RANK, NUM_RANKS, FOLDER)  # type: ignore[name-defined]  # noqa: F821
