"""YAML as a tree that remembers where every value was written: includes, references to files, layers, overrides.

A tree knows nothing of what the values mean; `messages` checks it against a pydantic model.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from moe_testbed.launcher.config.yaml_text import Keys, Loader, scalar
from moe_testbed.launcher.errors import ConfigError

INCLUDE = "include"
ANY = "*"
"""Stands for any key in the patterns of `Rules`."""


@dataclass(frozen=True)
class Origin:
    """Says where a value was written: a line of a file, or the command line (``file`` is None)."""

    file: Path | None = None
    line: int = 0

    def __str__(self) -> str:
        return "command line" if self.file is None else f"{shown(self.file)}:{self.line}"


COMMAND_LINE = Origin()


@dataclass(frozen=True)
class Node:
    """A value with its origin.

    Attributes:
        whole: it replaces a lower layer's mapping instead of merging with it.
        written: the text of a scalar.
    """

    value: Tree
    origin: Origin
    whole: bool = False
    written: str = ""


Tree: TypeAlias = dict[str, Node] | list[Node] | str | int | float | bool | None


@dataclass(frozen=True)
class Rules:
    """Says what is special about some places of a tree, as patterns of keys with `ANY` for one key.

    Attributes:
        references: a text here is the path of a YAML file that holds the mapping.
        variants: place -> the key that chooses which options there are (``name``). A layer that changes the choice
            drops the options of the layers below. Where the key is not given, it is the place's own last key.
        renamed: place -> the name that its key has today.
    """

    references: frozenset[Keys] = frozenset()
    variants: tuple[tuple[Keys, str], ...] = ()
    renamed: Mapping[Keys, str] = field(default_factory=dict)

    def is_reference(self, path: Keys) -> bool:
        """Returns whether a text at ``path`` names a file."""
        return any(_matches(pattern, path) for pattern in self.references)

    def choice_key(self, path: Keys) -> str | None:
        """Returns the key of the mapping at ``path`` that chooses its options, if there is one."""
        return next((key for pattern, key in self.variants if _matches(pattern, path)), None)


def _matches(pattern: Keys, path: Keys) -> bool:
    return len(pattern) == len(path) and all(p in (ANY, key) for p, key in zip(pattern, path, strict=True))


def read_layers(path: str | Path, overrides: Iterable[str], rules: Rules) -> Node:
    """Returns the tree of a YAML file under the overrides of the command line.

    Args:
        path: the file's; one that is not there is looked for among the embedded configs.
        overrides: texts like ``training.steps=100``.

    Raises:
        ConfigError: see `find_file`, `load_file` and `parse_overrides`.
    """
    tree = load_file(find_file(str(path), Path.cwd(), "command line"), rules)
    return merge(tree, parse_overrides(overrides, rules), rules)


def load_file(path: Path, rules: Rules, at: Keys = (), opened: tuple[Path, ...] = ()) -> Node:
    """Returns the tree of a YAML file, with what it includes and refers to.

    Args:
        path: an existing file, see `find_file`.
        at: the place of the file's mapping in the whole tree.
        opened: the files that are being read around this one.

    Raises:
        ConfigError: no valid YAML, no mapping, a key twice, a cycle of includes, a file that is not there.
    """
    path = path.resolve()
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        origin = Origin(path, _line_at(content, error.start))
        raise ConfigError(f"{origin}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    tree = _parse(text, path)
    if tree.value is None:
        tree = replace(tree, value={})
    if not isinstance(tree.value, dict):
        raise ConfigError(f"{tree.origin}: expected a mapping of keys to values, got {to_plain(tree)!r}")
    return _expand(tree, rules, at, (*opened, path))


def parse_overrides(texts: Iterable[str], rules: Rules) -> Node:
    """Returns the tree of ``a.b=VALUE`` texts from the command line, VALUE in YAML; a later one wins.

    Raises:
        ConfigError: a text of another form, or what `load_file` raises for a file that a value refers to.
    """
    tree = Node({}, COMMAND_LINE)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not value or not all(key.split(".")):
            raise ConfigError(f"command line: expected KEY=VALUE, such as training.steps=100, got '{text}'")
        tree = merge(tree, _nested(tuple(key.split(".")), _parse(value, None, text)), rules)
    return _expand(tree, rules, (), ())


def split_dotted(tree: Node, rules: Rules) -> Node:
    """Returns the mapping with keys like ``routing.router.name`` opened into mappings, and its references read."""
    assert isinstance(tree.value, dict)
    result = Node({}, tree.origin)
    for key, node in tree.value.items():
        result = merge(result, _nested(tuple(key.split(".")), node), rules)
    return _expand(result, rules, (), ())


def merge(low: Node, high: Node, rules: Rules, at: Keys = ()) -> Node:
    """Lays ``high`` over ``low``: mappings merge key by key, anything else is replaced."""
    if high.whole or not isinstance(low.value, dict) or not isinstance(high.value, dict):
        return high
    choice = rules.choice_key(at)
    if choice in high.value:
        default = Node(at[-1], low.origin)
        if low.value.get(choice, default).value != high.value[choice].value:
            return high
    merged = dict(low.value)
    for key, node in high.value.items():
        merged[key] = merge(merged[key], node, rules, (*at, key)) if key in merged else node
    # What a mapping lacks is to be written into its file, whatever the command line adds to it.
    return Node(merged, low.origin if high.origin == COMMAND_LINE else high.origin, low.whole)


def lookup(tree: Node, path: Iterable[str | int]) -> Node | None:
    """Returns the node at a path, None if there is none."""
    node: Node | None = tree
    for key in path:
        if node is None:
            return None
        if isinstance(node.value, dict):
            node = node.value.get(str(key))
        elif isinstance(node.value, list) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
        else:
            return None
    return node


def to_plain(node: Node) -> Any:
    """Returns the value without origins."""
    if isinstance(node.value, dict):
        return {key: to_plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [to_plain(child) for child in node.value]
    return node.value


def find_file(name: str, folder: Path, origin: str) -> Path:
    """Returns the YAML file that ``name`` means: in ``folder``, else among the embedded configs.

    Raises:
        ConfigError: neither has it; the message starts with ``origin`` and names the nearest embedded file.
    """
    # Unlike pathlib's, those of os.path take any text: of no user ("~nobody/a.yaml"), too long for a name.
    path = folder / os.path.expanduser(name)
    if os.path.isfile(path):
        return path
    # configs/experiments/tiny.yaml as in a checkout, ../models/tiny.yaml as in an embedded file, experiments/tiny.yaml
    inside = [part for part in Path(name).parts if part not in ("..", ".")]
    inside = inside[1:] if inside[:1] == ["configs"] else inside
    embedded = embedded_configs()
    if inside and not Path(name).is_absolute() and os.path.isfile(embedded / Path(*inside)):
        return embedded / Path(*inside)
    known = [file.relative_to(embedded).as_posix() for file in sorted(embedded.rglob("*.yaml"))]
    near = difflib.get_close_matches("/".join(inside), known, n=1, cutoff=0.5)
    hint = f" Did you mean 'configs/{near[0]}'?" if near else f" Embedded are: {', '.join(known)}"
    raise ConfigError(f"{origin}: there is no file '{name}', neither in {shown(folder)} nor embedded.{hint}")


def embedded_configs() -> Path:
    """Returns the folder of the YAML files that come with the package."""
    return Path(str(resources.files("moe_testbed.configs")))


def shown(path: Path) -> str:
    """Returns a path as messages show it: relative below the working directory, embedded files as configs/..."""
    for base, prefix in ((Path.cwd(), Path()), (embedded_configs().resolve(), Path("configs"))):
        if path.resolve().is_relative_to(base):
            return str(prefix / path.resolve().relative_to(base))
    return str(path)


def _nested(keys: Keys, node: Node) -> Node:
    for key in reversed(keys):
        node = Node({key: node}, node.origin)
    return node


def _parse(text: str, file: Path | None, override: str = "") -> Node:
    """Returns the tree of one YAML text as it stands."""
    try:
        root = yaml.compose(text, Loader=Loader)
        return _construct(root, file) if root is not None else Node(None, Origin(file, 1))
    except yaml.reader.ReaderError as error:
        line, problem = _line_at(text, error.position), str(error).splitlines()[0]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 1
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    except RecursionError:
        line, problem = 1, "values are nested too deeply, or one contains itself, as in &a [*a]"
    place = f"{Origin(file, line)}:" if file else f"{COMMAND_LINE}: {override!r}"
    raise ConfigError(f"{place} is not valid YAML: {problem}")


def _line_at(text: str | bytes, position: int) -> int:
    """Returns the line, counted from 1, of a character or byte."""
    return (text[:position].count("\n") if isinstance(text, str) else text[:position].count(b"\n")) + 1


def _construct(node: yaml.Node, file: Path | None, line: int | None = None) -> Node:
    origin = Origin(file, line or node.start_mark.line + 1) if file else COMMAND_LINE
    if isinstance(node, yaml.MappingNode):
        children: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key = scalar(key_node)
            # The steps of a schedule: {0: 0.1, 1000: 0.01}.
            key = str(key) if type(key) is int else key
            key_origin = Origin(file, key_node.start_mark.line + 1) if file else COMMAND_LINE
            if not isinstance(key, str):
                raise ConfigError(f"{key_origin}: the key {key!r} is no text; write it in quotes")
            if key in children:
                raise ConfigError(
                    f"{key_origin}: the key '{key}' stands here a second time (first: {children[key].origin})"
                )
            children[key] = _construct(value_node, file, key_node.start_mark.line + 1)
        return Node(children, origin)
    if isinstance(node, yaml.SequenceNode):
        return Node([_construct(item, file) for item in node.value], origin)
    return Node(scalar(node), origin, written=node.value)


def _expand(node: Node, rules: Rules, at: Keys, opened: tuple[Path, ...]) -> Node:
    """Reads the files that ``include`` and references name."""
    if isinstance(node.value, str) and rules.is_reference(at):
        return replace(_load(node.value, node.origin, rules, at, opened), origin=node.origin, whole=True)
    if not isinstance(node.value, dict):
        return node
    children = _with_new_names(node.value, rules, at)
    own = {key: _expand(child, rules, (*at, key), opened) for key, child in children.items() if key != INCLUDE}
    result = replace(node, value=own)
    if INCLUDE not in node.value:
        return result
    included = node.value[INCLUDE]
    names = to_plain(included)
    names = names if isinstance(names, list) else [names]
    base = Node({}, node.origin)
    for name in names:
        if not isinstance(name, str):
            raise ConfigError(
                f"{included.origin}: include takes the path of a YAML file or a list of them, got {name!r}"
            )
        base = merge(base, _load(name, included.origin, rules, at, opened), rules, at)
    return replace(merge(base, result, rules, at), origin=node.origin)


def _load(name: str, origin: Origin, rules: Rules, at: Keys, opened: tuple[Path, ...]) -> Node:
    """Returns the tree of the file that is named at an origin."""
    path = find_file(name, origin.file.parent if origin.file else Path.cwd(), str(origin)).resolve()
    if path in opened:
        cycle = " -> ".join(shown(file) for file in (*opened[opened.index(path) :], path))
        raise ConfigError(f"{origin}: {shown(path)} includes itself: {cycle}; remove one of these includes")
    return load_file(path, rules, at, opened)


def _with_new_names(children: dict[str, Node], rules: Rules, at: Keys) -> dict[str, Node]:
    """Returns the mapping at ``at`` with old keys under their new names. Raises ConfigError where both are given."""
    result: dict[str, Node] = {}
    for key, child in children.items():
        name = rules.renamed.get((*at, key), key)
        if name != key and name in children:
            old, new = (".".join((*at, one)) for one in (key, name))
            raise ConfigError(
                f"{child.origin}: {old} is the old name of {new}, which is given too ({children[name].origin}); "
                f"leave {old} out"
            )
        result[name] = child
    return result
