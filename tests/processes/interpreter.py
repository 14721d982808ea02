"""What a process of python.py does as an interpreter would; ARGUMENTS, STREAMS, ENVIRONMENT and FOLDER are its
variables."""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import sys
import traceback


def main(arguments: tuple[str, ...], streams: dict[int, str], environment: dict[str, str], folder: str) -> None:
    """Takes over the streams, the variables and the working directory, and runs what the arguments say."""
    # As in rank.py: no collection of garbage is to pass over what the server has imported.
    gc.freeze()
    for number, path in streams.items():
        stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    try:
        _run(arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        # A process of `multiprocessing` ends without them.
        atexit._run_exitfuncs()


def _run(arguments: tuple[str, ...]) -> None:
    option, *rest = arguments
    if option == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif option == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, os.path.dirname(os.path.abspath(option)))
        runpy.run_path(option, run_name="__main__")


main(ARGUMENTS, STREAMS, ENVIRONMENT, FOLDER)  # type: ignore[name-defined]  # noqa: F821
