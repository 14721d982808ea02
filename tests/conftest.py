"""What tests of several packages share."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from moe_testbed.launcher.report import two_processes

# Two pytest processes share the cores, and so do the ranks that they start. Torch reads it when it is imported.
os.environ["OMP_NUM_THREADS"] = "1"

# What collecting the tests imports and builds is no garbage: half a million objects that stay to the end.
gc.disable()

Write = Callable[[str, str], Path]

EXPERIMENT = """
    name: small
    data:
      mix:
        name: two
        domains:
          letters:
            sources: [{kind: files, glob: letters/*.txt}]
          digits:
            sources: [{kind: files, glob: digits/*.txt}]
      sequence_length: 16
    model:
      num_layers: 2
      hidden_size: 16
      num_heads: 2
      moe: {num_experts: 8, top_k: 2, expert_hidden_size: 8}
    routing:
      router: {name: top_k, normalise: false}
      balance:
        load_balancing_loss: {coefficient: 0.02, scope: sequence}
    training:
      steps: 4
      global_batch_size: 8
      micro_batch_size: 4
      learning_rate: 1e-3
    tracking: {mlflow: false}
"""


def pytest_collection_finish() -> None:
    """From here on garbage is collected again, and no collection passes over what is there already."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def reports_by_one_process() -> Iterator[None]:
    """Where both cores are busy with tests, a second process for a report costs a start and saves nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_processes, "WORTHWHILE", sys.maxsize)
        yield


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a text, without its indentation, to a file below the working directory, which is a fresh one."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


@pytest.fixture
def experiment(write: Write) -> Path:
    """small.yaml in the working directory: a whole experiment of two domains, eight experts and four steps."""
    return write("small.yaml", EXPERIMENT)
