"""`python ARGUMENTS` without the seconds that imports take: a fork of the server in which they are done.

A test of what a process imports, or of how it starts, needs a real interpreter.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.processes.forkserver import fork

ENTRY = Path(__file__).with_name("interpreter.py")


class Python:
    """A running interpreter, with the methods of ``subprocess.Popen``.

    Args:
        arguments: ``-m MODULE ...``, ``-c CODE ...`` or ``FILE ...``.
        stdout: the file that gets what is printed.
        stderr: the file that gets the errors; it may be the same one.
        environment: all variables; by default those of this process. What the server's imports have read of them
            (``DS_ACCELERATOR``, ``OMP_NUM_THREADS``) stays as it was then.
        folder: the working directory; by default that of this process.
    """

    def __init__(
        self,
        *arguments: str,
        stdout: Path,
        stderr: Path,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        variables = {
            "ARGUMENTS": arguments,
            "STREAMS": {1: str(stdout), 2: str(stderr)},
            "ENVIRONMENT": dict(os.environ if environment is None else environment),
            "FOLDER": str(folder or Path.cwd()),
        }
        for file in (stdout, stderr):
            # It is there at once, as if this process had opened it.
            file.touch()
        self._process = fork(ENTRY, variables)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, -N after signal N, None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Returns the exit status, or None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status once there is one; raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("python", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self._process.kill()


def run_python(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end, as ``subprocess.run`` with captured text; raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryDirectory() as logs:
        stdout, stderr = Path(logs, "stdout"), Path(logs, "stderr")
        process = Python(*arguments, stdout=stdout, stderr=stderr, environment=environment, folder=folder)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
            process.wait()
        return subprocess.CompletedProcess(["python", *arguments], code, stdout.read_text(), stderr.read_text())
