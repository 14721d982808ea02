"""The grid of a suite: every combination of some axes is a run."""

from __future__ import annotations

import itertools
from dataclasses import replace

from moe_testbed.launcher.config.experiment import RULES
from moe_testbed.launcher.config.yaml_tree import Node, Rules, lookup, merge, split_dotted, to_plain
from moe_testbed.launcher.errors import ConfigError

GRID, RUNS = "grid", "runs"
# Old names of keys stay: what a run lists itself, which may have them too, is merged with what the grid says.
_RULES = replace(RULES, renamed={})


def expand_grid(suite: Node) -> Node:
    """Returns the suite with its grid turned into runs, before those that it lists itself.

    ``grid`` maps axis -> label -> overrides. A run's label joins one label of each axis with ``-``; a later axis wins
    where two override the same value. A run listed under ``runs`` with the label of a combination changes that one.

    Raises:
        ConfigError: the grid has another form, or an axis has no labels.
    """
    grid = lookup(suite, (GRID,))
    if grid is None or grid.value == {} or not isinstance(suite.value, dict):
        return suite
    names, axes = list(_mapping(grid, GRID)), []
    for name, axis in _mapping(grid, GRID).items():
        options = _mapping(axis, f"{GRID}.{name}")
        axes.append([(label, _mapping_node(node, f"{GRID}.{name}.{label}")) for label, node in options.items()])
    combined = {}
    for combination in itertools.product(*axes):
        overrides = Node({}, grid.origin)
        for _, option in combination:
            overrides = merge(overrides, split_dotted(option, _RULES), _RULES)
        labels = [label for label, _ in combination]
        described = ", ".join(f"{axis} {label}" for axis, label in zip(names, labels, strict=True)).replace("_", " ")
        run = {"description": Node(described, grid.origin), "overrides": overrides}
        combined["-".join(labels)] = Node(run, grid.origin)
    rest = {key: node for key, node in suite.value.items() if key != GRID}
    own = rest.get(RUNS, Node({}, grid.origin))
    return Node({**rest, RUNS: merge(Node(combined, grid.origin), own, Rules())}, suite.origin)


def _mapping(node: Node, place: str) -> dict[str, Node]:
    if not isinstance(node.value, dict) or not node.value:
        raise ConfigError(
            f"{node.origin}: {place} is {to_plain(node)!r}; expected axis -> label -> overrides, such as "
            "grid: {choices: {top1: {model.moe.top_k: 1}, top2: {model.moe.top_k: 2}}}"
        )
    return node.value


def _mapping_node(node: Node, place: str) -> Node:
    """Returns a label's overrides; nothing at all (the experiment as it is) may be written as {} or null."""
    if node.value is None or node.value == {}:
        return Node({}, node.origin)
    _mapping(node, place)
    return node
