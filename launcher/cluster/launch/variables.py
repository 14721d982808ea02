"""The variables of processes on other hosts: which they get, and the script that sets them.

deepspeed would write each into the command lines of all hosts, where `ps` shows it to everybody, and escape nothing in
it. The script stands in the run's folder, and only its owner can read it.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from moe_testbed.launcher.errors import ConfigError

PASSED_ON = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")
"""With these begin the names of the variables that deepspeed passes on by itself."""

FOR_PYTHON = ("PYTHONHOME", "PYTHONNOUSERSITE", "PYTHONPATH", "PYTHONSAFEPATH", "PYTHONUSERBASE")
"""Those of them that stay with deepspeed: without them Python may not find it, here and on the hosts."""

_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_PLAIN = re.compile(r"[\w@%+=:,./-]*")


def kept_from_deepspeed(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables that deepspeed would pass on in its own way."""
    return {name: value for name, value in environment.items() if name.startswith(PASSED_ON) and name not in FOR_PYTHON}


def start_script(environment: Mapping[str, str], variables: Mapping[str, str]) -> str:
    """Returns the script that starts moe-testbed with its own arguments.

    Args:
        environment: variables that deepspeed's files may replace.
        variables: these hold.

    Raises:
        ConfigError: a line of deepspeed's file for variables is none.
    """
    first = "# Written by `moe-testbed launch`, which removes it when it ends."
    last = f'exec {shlex.quote(sys.executable)} -u -m moe_testbed.launcher "$@"'
    lines = [first, *_exports(environment), *_lines_for_deepspeed(), *_exports(variables), last]
    return "".join(f"{line}\n" for line in lines)


def _exports(variables: Mapping[str, str]) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in variables.items() if _NAME.fullmatch(name)]


def _lines_for_deepspeed() -> list[str]:
    """Returns what deepspeed's files for variables say, as it would hand it to the shells of the hosts."""
    name = os.environ.get("DS_ENV_FILE", ".deepspeed_env")
    files = dict.fromkeys(folder / name for folder in (Path.home(), Path()))
    return [_export(file, number, line) for file in files if file.is_file() for number, line in _lines(file)]


def _lines(file: Path) -> list[tuple[int, str]]:
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1)]
    return [(number, line) for number, line in numbered if line and not line.startswith("#")]


def _export(file: Path, number: int, line: str) -> str:
    name, equals, value = (part.strip() for part in line.partition("="))
    if not equals or not _NAME.fullmatch(name):
        # Without the line, which may be a part of a password.
        raise ConfigError(f"{file}, line {number}: it sets no variable; write NAME=VALUE, or remove it")
    return f"export {name}={value}" if _PLAIN.fullmatch(value) else f'export {name}="{value}"'
