"""The fork server of a suite: a process that has imported what a training needs, and forks one for each training.

    python -m moe_testbed.launcher.suites.fork_server DESCRIPTOR MODULE ...

Importing torch and DeepSpeed takes longer than a short training; a fork has them at once. The server runs nothing of
torch itself, so that it has started no pool of threads and no GPU, neither of which a fork can use. `forks` has the
other end of its socket, where each message is a JSON object:

    {"arguments": [...], "folder": PATH}    train with these arguments of `moe-testbed` in this working directory, and
                                            print into the file whose descriptor is sent along
    {"started": PID}                        the answer
    {"ended": PID, "status": N}             the exit status of one that was started, -N after signal N

The trainings are children of the server. It ends when the suite's process does, and they end with it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.suites.processes import PARENT_VARIABLE, end_with_parent

MODULES = (
    "moe_testbed.launcher.cli.main",
    "moe_testbed.launcher.train.train",
    "moe_testbed.launcher.train.loop",
    # `deepspeed.initialize` imports it.
    "deepspeed.module_inject.auto_ep_layer",
)
"""What every training imports before its last step."""

WITH_ABLATION = ("scipy.optimize",)
"""What it imports besides if its experts are ablated: the assignment of experts to domains."""

LONGEST_MESSAGE = 1 << 17


def main() -> int:
    """Serves the socket; a child of it trains. Returns the exit status of either."""
    end_with_parent()
    connection = socket.socket(fileno=int(sys.argv[1]))
    # They are read by imports; a training sets them too.
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in sys.argv[2:]:
        importlib.import_module(name)
    # These objects live as long as the process: its children need neither look for garbage among them nor copy them.
    gc.collect()
    gc.freeze()
    arguments = _serve(connection)
    if arguments is None:
        return 0
    sys.argv = ["moe-testbed", *arguments]
    status = int(sys.modules["moe_testbed.launcher.cli.main"].main(arguments))
    # Taking down all that was imported would take longer than all that went before the first step.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(connection: socket.socket) -> list[str] | None:
    """Returns, in each child, its arguments; None, in the server, once the suite's process has closed the socket."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    server, requests = os.getpid(), connection.fileno()
    while True:
        ready, _, _ = select.select([requests, reader], [], [])
        if reader in ready:
            os.read(reader, 1 << 10)
            for pid, status in _ended():
                _send(connection, {"ended": pid, "status": status})
        if requests not in ready:
            continue
        message, files, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 1)
        if not message:
            return None
        # Locks that other threads hold would stay locked in a fork, and a GPU cannot be used by one.
        assert threading.active_count() == 1 and not sys.modules["torch"].cuda.is_initialized()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            os.close(reader)
            os.close(writer)
            request = json.loads(message)
            _become_a_training(server, request["folder"], files[0])
            arguments: list[str] = request["arguments"]
            return arguments
        os.close(files[0])
        # Whoever comes first, the child or this process, makes the group: it is there when the answer is.
        _own_group(pid)
        _send(connection, {"started": pid})


def _become_a_training(server: int, folder: str, log: int) -> None:
    """Gives a child what a new process has: a group of its own, its output, and random numbers of its own."""
    _own_group(os.getpid())
    os.environ[PARENT_VARIABLE] = str(server)
    os.chdir(folder)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Python's own generator does so by itself, and torch's begins with the same seed in every process.
    sys.modules["numpy"].random.seed()


def _own_group(pid: int) -> None:
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it has ended
        os.setpgid(pid, pid)


def _ended() -> Iterator[tuple[int, int]]:
    """Yields process and exit status of the children that have ended since the last call."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # the suite's process has ended, as the next message, an empty one, says
        connection.send(json.dumps(message).encode())


if __name__ == "__main__":
    sys.exit(main())
