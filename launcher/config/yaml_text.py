"""The YAML that configs are written in: 1.1 without its surprises, read as scalars and written as text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

Keys = tuple[str, ...]


class Loader(yaml.SafeLoader):
    """Reads YAML 1.1 without its surprises: 3e-4 is a number, yes/no/on/off and 2024-01-01 are texts."""


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `Loader` or a YAML 1.1 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|false|False", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        list("-+.0123456789"),
    ),
}
Loader.yaml_implicit_resolvers = {}
for _class, _tags in ((Loader, _SCALARS), (_Dumper, ("float",))):
    for _tag in _tags:
        _pattern, _first = _SCALARS[_tag]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


def scalar(node: yaml.Node) -> Any:
    """Returns the text, number or truth value that a node of YAML means, or None. Raises yaml.YAMLError if it means
    anything else."""
    loader = Loader("")
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, LookupError, AttributeError, TypeError):
        # A tag that the text does not fit: !!int x. A number of thousands of digits.
        value = node
    finally:
        loader.dispose()
    if isinstance(value, str | int | float | None):
        return value
    tag = node.tag.replace("tag:yaml.org,2002:", "!!")
    written = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
    problem = f"'{written}' with the tag {tag} is no text, number, truth value or null that can be read"
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def to_yaml(value: Any, origins: dict[Keys, str] | None = None) -> str:
    """Returns plain values as YAML that `load_file` reads back; ``origins`` (path -> where from) become comments."""
    lines = list(_lines(value, (), 0))
    if origins is None:
        return "".join(f"{text}\n" for text, _ in lines)
    width = min(max(len(text) for text, _ in lines), 60)
    return "".join(f"{text:<{width}}  # {origins[path]}\n" if path in origins else f"{text}\n" for text, path in lines)


def _lines(value: Any, path: Keys, indent: int) -> Iterator[tuple[str, Keys]]:
    """Yields the lines of a mapping or list in block style, each with the path of the value that it ends with."""
    margin = " " * indent
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        head = f"{margin}{_inline(key)}:" if isinstance(value, dict) else f"{margin}-"
        at = (*path, str(key))
        if is_block(child):
            if isinstance(value, dict):
                yield head, ()
                yield from _lines(child, at, indent + 2)
            else:
                (first, first_path), *rest = _lines(child, at, indent + 2)
                yield f"{head} {first.lstrip()}", first_path
                yield from rest
        else:
            yield f"{head} {_inline(child)}", at


def is_block(value: Any) -> bool:
    """Returns whether a value gets lines of its own; lists of scalars and empty mappings stand on their key's line."""
    if isinstance(value, dict):
        return bool(value)
    return isinstance(value, list) and any(isinstance(item, dict | list) for item in value)


_LINE_ENDS = re.compile(r"[\n\r\x85\u2028\u2029]")


def _inline(value: Any) -> str:
    style: dict[str, Any] = {"Dumper": _Dumper, "default_flow_style": True, "width": 2**31}
    if isinstance(value, str) and _LINE_ENDS.search(value):
        # In one line, as a key must be; and PyYAML would write the ends of lines that only Unicode has as they are.
        text = yaml.dump(value, default_style='"', **style)
    else:
        ends = isinstance(value, list) and any(isinstance(item, str) and _LINE_ENDS.search(item) for item in value)
        text = yaml.dump(value, allow_unicode=not ends, **style)
    # Not all white space: a text may begin or end with a space that is not the ASCII one.
    return text.removesuffix("...\n").strip(" \n")
