"""Work of two processes is that of one."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.report import two_processes
from moe_testbed.launcher.report.figures.drawing import draw
from moe_testbed.launcher.report.figures.figures import _jobs
from moe_testbed.launcher.report.numbers.results import summarise
from moe_testbed.launcher.report.read.records import read_suite
from moe_testbed.launcher.report.two_processes import in_two

MakeSuite = Callable[..., Path]


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """As if there were two cores and two items worth a process; the commands that were started."""
    commands: list[list[str]] = []

    class Started(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **options: object) -> None:
            commands.append(command)
            super().__init__(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(two_processes, "WORTHWHILE", 2)
    monkeypatch.setattr(two_processes, "usable_cores", lambda: 2)
    monkeypatch.setattr(two_processes.subprocess, "Popen", Started)
    return commands


def test_numbers_and_pictures_are_those_of_one_process(
    make_suite: MakeSuite, two: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = read_suite(make_suite(labels=("reference", "permuted_reference", "broken"), num_layers=1))
    shared = summarise(suite)
    jobs = list(_jobs(suite, shared))
    pickle.dumps(jobs)  # Any of them may be the second process's.
    jobs = jobs[-3:]
    pictures = in_two(draw, jobs)
    assert len(two) == 2
    monkeypatch.setattr(two_processes, "usable_cores", lambda: 1)
    assert summarise(suite) == shared
    assert in_two(draw, jobs) == pictures == draw(jobs)
    assert len(two) == 2


@pytest.mark.parametrize("executable", ["/bin/false", "/bin/true", sys.executable])
def test_what_a_second_process_fails_at_the_first_does(
    two: list[list[str]], monkeypatch: pytest.MonkeyPatch, executable: str
) -> None:
    monkeypatch.setattr(two_processes.sys, "executable", executable)
    # Even the interpreter cannot help: it does not know this module.
    assert in_two(doubled, [1, 2, 3, 4, 5]) == [2, 4, 6, 8, 10]
    assert len(two) == 1


# What a caller may be: without a guard around it, and with a thread.
SCRIPT = """
import threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("starts", flush=True)
from moe_testbed.launcher.report import two_processes
two_processes.WORTHWHILE, two_processes.usable_cores = 2, lambda: 2
ask, answers = two_processes._ask, []
two_processes._ask = lambda question: answers.append(ask(question)) or answers[-1]
print(two_processes.in_two(list, [1, 2, 3, 4, 5]), [len(answer) > 0 for answer in answers])
"""


@pytest.mark.parametrize("in_a_file", [True, False])
def test_the_caller_is_not_run_anew_and_needs_no_guard(tmp_path: Path, in_a_file: bool) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = ["script.py"] if in_a_file else ["-c", SCRIPT]
    done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["starts", "[1, 2, 3, 4, 5] [True]"]


def doubled(numbers: list[int]) -> list[int]:
    return [2 * number for number in numbers]
