"""What the children do: train, and die on the way."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

from moe_testbed.launcher.checkpoint import checkpoints
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.run.folder import RunFolder
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.train import inputs, loop
from moe_testbed.launcher.train import train as training


def train(config: dict[str, Any], run_dir: str) -> None:
    """Trains to the end."""
    training.train(ExperimentConfig.model_validate(config), Path(run_dir))


def train_and_list_modules(config: dict[str, Any], run_dir: str) -> list[str]:
    """Trains to the end, and returns the names of all modules that are imported then."""
    train(config, run_dir)
    return list(sys.modules)


def train_without_umask(config: dict[str, Any], run_dir: str) -> None:
    """Trains in a process whose files everybody may write."""
    os.umask(0)
    train(config, run_dir)


def train_and_die(config: dict[str, Any], run_dir: str, where: str, number: int) -> None:
    """Trains, and kills its own process by SIGKILL at a place of ``PLACES``, when it comes there for the n-th time."""
    PLACES[where](number)
    train(config, run_dir)


def multiply_instead(config: dict[str, Any], run_dir: str, value: float, count: int) -> tuple[int, int]:
    """Multiplies so many values by 1 where a training would take its steps.

    Returns:
        The number of torch's threads, and how many of the products are not 0.
    """
    found = []

    def multiply(*_: Any) -> None:
        products = torch.full((count,), value) * torch.ones(count)
        # As integers, since a comparison takes a denormal number for 0 as well.
        found.append((torch.get_num_threads(), int(products.view(torch.int32).count_nonzero())))

    loop.run_loop = multiply
    train(config, run_dir)
    return found[0]


def train_and_fail(config: dict[str, Any], run_dir: str, number: int) -> None:
    """Trains, and raises at the n-th batch."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("the reason\nand more of it")

    _at_call(inputs.Sampler, "rows", number, fail)
    train(config, run_dir)


def train_on_a_full_disk(config: dict[str, Any], run_dir: str) -> None:
    """Trains where no file of tensors can be written; the error is what torch.save raises on a full disk."""

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("[enforce fail at inline_container.cc:862] . PytorchStreamWriter failed writing file data/0")

    torch.save = fail
    train(config, run_dir)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _at_call(
    owner: Any, name: str, number: int, last_act: Callable[..., None], counts: Callable[..., bool] | None = None
) -> None:
    """Replaces the n-th call of ``owner.name``, of those that count, by ``last_act`` and death."""
    original = getattr(owner, name)
    calls = 0

    def replacement(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += counts is None or counts(*arguments, **options)
        if calls < number:
            return original(*arguments, **options)
        last_act(*arguments, **options)
        _die()

    setattr(owner, name, replacement)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _half_a_tensor_file(state: Any, path: Any, *_: Any, **__: Any) -> None:
    whole = io.BytesIO()
    _real_torch_save(state, whole)
    Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])


def _half_a_line(folder: RunFolder, line: MetricsLine) -> None:
    with (folder.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line.content())[:20])


def _is_folder(path: Path, *_: Any, **__: Any) -> bool:
    return path.is_dir()


def _half_a_folder(path: Path, *_: Any, **__: Any) -> None:
    for file in sorted(path.glob("*.pt"))[::2]:
        file.unlink()


_real_torch_save = torch.save

PLACES: dict[str, Callable[[int], None]] = {
    "before a step": lambda n: _at_call(loop, "train_step", n, _nothing),
    "writing a line": lambda n: _at_call(RunFolder, "append_metrics", n, _half_a_line),
    "before arrays are written": lambda n: _at_call(RunFolder, "_write_arrays", n, _nothing),
    "before the analysis is written": lambda n: _at_call(RunFolder, "write_ablation", n, _nothing),
    "inside a checkpoint's file": lambda n: _at_call(torch, "save", n, _half_a_tensor_file),
    "before a checkpoint is marked": lambda n: _at_call(checkpoints, "write_mark", n, _nothing),
    "removing an old checkpoint": lambda n: _at_call(shutil, "rmtree", n, _half_a_folder, _is_folder),
}
