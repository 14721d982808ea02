"""Writes files that others may be reading as a whole, and reads them without trust."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import mkstemp
from typing import Any

import yaml

from moe_testbed.launcher.errors import visible

_TWO_OBJECTS = re.compile(rb"}\s*,\s*{")
"""What stands in a line of JSON that holds two objects beside each other."""


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file so that a reader, or a later start after a crash, sees the old or the new one and never a
    half."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    """Does what `write_atomically` does, for bytes."""
    # Processes of several hosts may have the same number.
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def write_privately(path: Path, text: str) -> None:
    """Replaces a file by one that no other user can read, at no time."""
    descriptor, temporary = mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "wb") as file:
        # Bytes of a variable that are no text come as surrogates.
        file.write(text.encode("utf-8", "surrogateescape"))
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; empty if there is none or the file was cut off."""
    try:
        content = _bounded(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """Returns the mapping in a YAML file; empty if there is none or the file is damaged."""
    try:
        content = load_yaml(path)
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_yaml(path: Path) -> Any:
    """Returns what a YAML file holds, as plain values. Raises OSError, ValueError."""
    try:
        return _bounded(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, RecursionError, LookupError, AttributeError, TypeError) as error:
        # The last three are of tags that a value does not fit: !!bool x.
        raise ValueError(str(error)) from error


def _bounded(tree: Any) -> Any:
    """Returns the tree. Raises ValueError if whoever goes through it would come to no end: in YAML a value can stand at
    many places, and in itself."""
    level, values = [tree], 0
    for _ in range(_MOST_LEVELS):
        level = list(itertools.islice(itertools.chain.from_iterable(map(_children, level)), _MOST_VALUES))
        values += len(level)
        if not level:
            return tree
        if values >= _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
    raise ValueError(f"its values are nested in more than {_MOST_LEVELS} levels")


_MOST_LEVELS, _MOST_VALUES = 100, 1_000_000


def _children(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def value_at(tree: Any, *keys: str) -> Any:
    """Returns the value under these keys, one in the other; None if there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def read_json_lines(path: Path, last_bytes: int | None = None) -> list[dict[str, Any]]:
    """Returns the objects in a file of JSON lines; empty if there is none. A line that was cut off is left out.

    Args:
        last_bytes: only the lines that begin within so many bytes of the end; None: all.
    """
    try:
        with path.open("rb") as file:
            if last_bytes is not None:
                file.seek(max(0, os.fstat(file.fileno()).st_size - last_bytes))
            texts = file.read().splitlines()
    except OSError:
        return []
    return [line for line in _parsed_lines(texts) if isinstance(line, dict)]


def _parsed_lines(texts: list[bytes]) -> list[Any]:
    """Returns the value in each text, None where there is none."""
    # In one call, which takes a third of the time of a call a line. No line can hold two objects: if there are as many
    # objects as lines, then each line is one.
    if not any(map(_TWO_OBJECTS.search, texts)):
        lines = _parsed(b"[" + b",".join(texts) + b"]")
        if isinstance(lines, list) and len(lines) == len(texts) and all(isinstance(line, dict) for line in lines):
            return lines
    return [_parsed(text) for text in texts]


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def visible_tree(tree: Any) -> Any:
    """Returns what was read of a JSON or YAML file, with the texts and keys in it as `visible` has them."""
    if isinstance(tree, str):
        return visible(tree)
    if isinstance(tree, dict):
        return {visible_tree(key): visible_tree(value) for key, value in tree.items()}
    return [visible_tree(value) for value in tree] if isinstance(tree, list) else tree


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table as CSV with a line of headings. A text that a spreadsheet would take for a formula has an
    apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for row in (columns, *rows):
        writer.writerow(map(_no_formula, row))
    return text.getvalue()


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
