"""The dear parts of a report are computed once for all tests, in whichever process, where their data are equal."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.report.figures import drawing
from moe_testbed.launcher.report.numbers import causal, routing, training
from moe_testbed.routing.metrics import gap

# The functions of a report that take most of its time.
DEAR = (
    (drawing, "_draw"),
    (routing, "routing"),
    (routing, "usage"),
    (routing, "agreement"),
    (causal, "causes"),
    (training, "_course"),
    (gap, "recovered"),
)


class Answers:
    """What functions have returned, pickled in a folder by the function's name and its arguments.

    Attributes:
        folder: holds a file for each answer; other processes may use it at the same time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def of(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns what the function returns, a copy for each caller."""
        try:
            content = [_content(argument) for argument in arguments]
        except OSError:
            return function(*arguments)  # a file that is not there, or is none
        key = hashlib.sha256(pickle.dumps((function.__module__, function.__name__, content))).hexdigest()
        file = self.folder / key
        if not file.exists():
            own = self.folder / f"{key}.{os.getpid()}"
            own.write_bytes(pickle.dumps(function(*arguments)))
            own.replace(file)
        return pickle.loads(file.read_bytes())


def _content(argument: Any) -> Any:
    """Of a list of files, what stands in them and their names; of anything else, itself."""
    if isinstance(argument, list) and all(isinstance(path, Path) for path in argument):
        return [(path.name, path.read_bytes()) for path in argument]
    return argument


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Answers:
    """The answers that all processes of these tests share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "answers"
    folder.mkdir(exist_ok=True)
    return Answers(folder)


@pytest.fixture(scope="module", autouse=True)
def alike_once(answers: Answers) -> Iterator[None]:
    """Computes the dear parts of a report once for all tests where their data are equal to the last byte: most runs of
    a constructed suite are also in others.

    These parts are functions of their arguments alone. A test that asks whether the same comes out twice calls `forget`
    in between.
    """
    with pytest.MonkeyPatch.context() as patch:
        for module, name in DEAR:
            patch.setattr(module, name, partial(answers.of, getattr(module, name)))
        yield


@pytest.fixture
def forget(answers: Answers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets everything be computed anew for the rest of the test."""

    def forget() -> None:
        monkeypatch.setattr(answers, "folder", tmp_path / "answers")
        answers.folder.mkdir()

    return forget
