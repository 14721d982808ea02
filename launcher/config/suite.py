"""What a suite is: runs of one experiment that differ in a few values, each under several seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from moe_testbed.data.registry import did_you_mean
from moe_testbed.launcher.config.experiment import (
    RULES,
    ExperimentConfig,
    check_experiment,
    experiment_tree,
)
from moe_testbed.launcher.config.grid import expand_grid
from moe_testbed.launcher.config.messages import validate
from moe_testbed.launcher.config.names import NAME_PATTERN, training_name
from moe_testbed.launcher.config.renamed import RENAMED, new_keys
from moe_testbed.launcher.config.yaml_tree import (
    COMMAND_LINE,
    Node,
    Rules,
    find_file,
    lookup,
    merge,
    parse_overrides,
    read_layers,
    shown,
    split_dotted,
    to_plain,
)
from moe_testbed.launcher.errors import ConfigError

_INSTEAD = {"name": "the label in runs", "seed": "seeds"}


class SuiteRunConfig(BaseModel, extra="forbid", frozen=True):
    """Describes one run of a suite."""

    description: str = Field("", description="what the run is, in the report")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="values of the experiment; dotted keys may be used"
    )


class SuiteConfig(BaseModel, extra="forbid", frozen=True):
    """The content of configs/suites/*.yaml, and of a suite folder's suite.yaml."""

    name: str = Field(pattern=NAME_PATTERN, description="name of the suite's folder")
    experiment: str = Field(description="path of the experiment that every run starts from")
    overrides: dict[str, Any] = Field(default_factory=dict, description="values of the experiment for all runs")
    seeds: tuple[int, ...] = Field((1,), min_length=1, description="every run is trained once with each")
    reference: tuple[str, ...] = Field((), description="labels of the runs that the others are compared with")
    control: str | None = Field(None, description="label of the reference's information-free control")
    grid: dict[str, dict[str, dict[str, Any]]] = Field(
        default_factory=dict,
        description="axis -> label -> overrides: every combination becomes a run, its label joined by '-'",
    )
    runs: dict[str, SuiteRunConfig] = Field(min_length=1, description="label -> run")

    @model_validator(mode="after")
    def _labels_are_runs(self) -> SuiteConfig:
        for label in self.runs:
            if not re.match(NAME_PATTERN, label):
                raise ValueError(f"the label '{label}' in runs names a folder: use letters, digits, '_', '.' and '-'")
        for values in (self.overrides, *(run.overrides for run in self.runs.values())):
            for key in ("name", "seed"):
                if key in values:
                    raise ValueError(f"overrides sets '{key}', which is each run's own; use {_INSTEAD[key]}")
        for field, labels in (("reference", self.reference), ("control", (self.control,) if self.control else ())):
            for label in labels:
                if label not in self.runs:
                    hint = did_you_mean(label, self.runs)
                    raise ValueError(f"{field} names '{label}', which is no run.{hint} Runs: {', '.join(self.runs)}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds is {list(self.seeds)}: each must be there once and be at least 0")
        return self


@dataclass(frozen=True)
class SuiteRun:
    """One training of a suite."""

    label: str
    seed: int
    config: ExperimentConfig
    run_dir: Path

    @property
    def name(self) -> str:
        """Returns the name of the run's folder."""
        return self.run_dir.name


@dataclass(frozen=True)
class Suite:
    """A suite whose runs have all been checked. ``config`` holds the command line's values too."""

    config: SuiteConfig
    experiments: dict[tuple[str, int], ExperimentConfig]


def load_suite(path: str | Path, overrides: Iterable[str] = ()) -> Suite:
    """Returns the suite in a YAML file, under overrides.

    An override whose first key is one of the suite's own (``seeds=[1,2]``) changes the suite; any other
    (``training.steps=100``) changes the experiment of every run, above the file's own overrides.

    Raises:
        ConfigError: the suite or any of its runs is wrong; one line.
    """
    own: list[str] = []
    others: list[str] = []
    for text in overrides:
        first = text.split("=")[0].split(".")[0]
        if first == "seed":
            raise ConfigError(f"command line: '{text}': a suite trains its runs with several seeds; use seeds=[...]")
        if "=" in text and new_keys((first,))[0] not in {**SuiteConfig.model_fields, **ExperimentConfig.model_fields}:
            raise ConfigError(_unknown_override(first))
        (own if first in SuiteConfig.model_fields else others).append(text)
    tree = expand_grid(read_layers(path, own, Rules()))
    config = validate(SuiteConfig, tree, {})
    experiment = lookup(tree, ("experiment",))
    assert experiment is not None
    folder = experiment.origin.file.parent if experiment.origin.file else Path.cwd()
    base_file = find_file(config.experiment, folder, str(experiment.origin))
    base = merge(experiment_tree(base_file), _overrides(tree, ("overrides",)), RULES)
    above = parse_overrides(others, RULES)
    experiments = {}
    for label in config.runs:
        run = merge(merge(base, _overrides(tree, ("runs", label, "overrides")), RULES), above, RULES)
        for seed in config.seeds:
            identity = Node({"name": Node(label, COMMAND_LINE), "seed": Node(seed, COMMAND_LINE)}, COMMAND_LINE)
            try:
                experiments[label, seed] = check_experiment(merge(run, identity, RULES))
            except ConfigError as error:
                raise ConfigError(f"run '{label}' of the suite '{config.name}': {error}") from None
    resolved = {"experiment": shown(base_file), "runs": _with_overrides(config.runs, others)}
    return Suite(config.model_copy(update=resolved), experiments)


def suite_runs(suite: Suite, runs_dir: Path) -> list[SuiteRun]:
    """Returns the trainings of a suite, seed by seed, in the order of its runs."""
    folder = runs_dir / suite.config.name
    return [
        SuiteRun(label, seed, suite.experiments[label, seed], folder / training_name(label, seed))
        for seed in suite.config.seeds
        for label in suite.config.runs
    ]


def _with_overrides(runs: dict[str, SuiteRunConfig], texts: list[str]) -> dict[str, SuiteRunConfig]:
    """Returns the runs with the command line's values written out among their own."""
    added = {}
    for text in texts:
        keys = new_keys(tuple(text.split("=")[0].split(".")))
        node = lookup(parse_overrides([text], Rules(renamed=RENAMED)), keys)
        assert node is not None
        added[".".join(keys)] = to_plain(node)
    return {label: run.model_copy(update={"overrides": {**run.overrides, **added}}) for label, run in runs.items()}


def _unknown_override(key: str) -> str:
    keys = sorted({*SuiteConfig.model_fields, *ExperimentConfig.model_fields})
    hint = did_you_mean(key, keys)
    return f"command line: '{key}' is a key of neither a suite nor an experiment.{hint} Allowed here: {', '.join(keys)}"


def _overrides(tree: Node, path: tuple[str, ...]) -> Node:
    node = lookup(tree, path)
    return split_dotted(node, RULES) if node is not None else Node({}, COMMAND_LINE)
