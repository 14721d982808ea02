"""A forked interpreter does what a real one does."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes.forkserver import DEEPSPEED_MODULES, OTHER_MODULES, OUR_MODULES
from tests.processes.python import Python, run_python

SAY = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ.get('ONLY'), 'HOME' in os.environ, __name__)"


@pytest.mark.parametrize("module", [*OUR_MODULES, *DEEPSPEED_MODULES, *OTHER_MODULES])
def test_what_the_server_imports_is_there(module: str) -> None:
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize(
    "code",
    [
        SAY,
        "print('text'); raise ValueError('the reason')",
        "import sys; sys.exit('told')",
        "import sys; sys.exit(3)",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
    ],
)
def test_the_result_is_that_of_a_real_interpreter(code: str, tmp_path: Path) -> None:
    arguments, variables = ["-c", code, "a", "b c"], {"ONLY": "this"}
    real = subprocess.run(
        [sys.executable, *arguments], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    forked = run_python(*arguments, environment=variables, folder=tmp_path)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert forked.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_modules_and_files_run_as_main_with_their_arguments(tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("VALUE = 7")
    for name in ("tool.py", "__main__.py"):
        (tmp_path / name).write_text("import sys, neighbour; print(__name__, sys.argv[1:], neighbour.VALUE)")
    expected = "__main__ ['x'] 7\n"
    assert run_python(str(tmp_path / "tool.py"), "x").stdout == expected
    assert run_python("-m", "tool", "x", folder=tmp_path).stdout == expected
    found = run_python("-m", "tool", "x", environment=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert found.stdout == expected, found.stderr


def test_a_signal_reaches_the_process_and_its_number_is_the_status(tmp_path: Path) -> None:
    process = Python("-c", "import time; time.sleep(3600)", stdout=tmp_path / "log", stderr=tmp_path / "log")
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60.0) == process.returncode == -signal.SIGTERM
