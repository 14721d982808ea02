"""What a suite is: runs of one experiment that differ in a few values, each under several seeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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

_START = ("start", "encoder", "run")
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
    """One training of a suite.

    Attributes:
        parents: names of the trainings, of the same suite and seed, that it starts from.
    """

    label: str
    seed: int
    config: ExperimentConfig
    run_dir: Path
    parents: tuple[str, ...] = ()

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
    origins = {}
    for label in config.runs:
        run = merge(merge(base, _overrides(tree, ("runs", label, "overrides")), RULES), above, RULES)
        origins[label] = lookup(run, _START)
        for seed in config.seeds:
            identity = Node({"name": Node(label, COMMAND_LINE), "seed": Node(seed, COMMAND_LINE)}, COMMAND_LINE)
            try:
                experiments[label, seed] = check_experiment(merge(run, identity, RULES))
            except ConfigError as error:
                raise ConfigError(f"run '{label}' of the suite '{config.name}': {error}") from None
    starts = {label: start for label in config.runs if (start := _start(experiments[label, config.seeds[0]]))}
    for label, start in starts.items():
        try:
            _refuse_start(label, start, {name: experiments[name, config.seeds[0]] for name in config.runs})
        except ValueError as error:
            where = f"{node.origin}: " if (node := origins[label]) else ""
            raise ConfigError(f"run '{label}' of the suite '{config.name}': {where}{error}") from None
    _refuse_circle(starts)
    resolved = {"experiment": shown(base_file), "runs": _with_overrides(config.runs, others)}
    return Suite(config.model_copy(update=resolved), experiments)


def suite_runs(suite: Suite, runs_dir: Path) -> list[SuiteRun]:
    """Returns the trainings of a suite, seed by seed, in the order of its runs."""
    folder = runs_dir / suite.config.name

    def training(label: str, seed: int) -> SuiteRun:
        config = suite.experiments[label, seed]
        start = _start(config)
        parents = (training_name(start, seed),) if start in suite.config.runs else ()
        return SuiteRun(label, seed, config, folder / training_name(label, seed), parents)

    return [training(label, seed) for seed in suite.config.seeds for label in suite.config.runs]


def _start(config: ExperimentConfig) -> str | None:
    """Returns what an experiment starts from, as it is written; None if it draws its weights."""
    return config.start.encoder.run if config.start.encoder else None


def _refuse_start(label: str, start: str, experiments: Mapping[str, ExperimentConfig]) -> None:
    """Raises ValueError if what a run starts from is neither another run of the suite, whose encoder it can take, nor
    a folder."""
    place = f"start.encoder.run is '{start}'"
    if start == label:
        raise ValueError(
            f"{place}, the run itself; name another run, and give start in the overrides of the runs that start from "
            "others, not in those of all"
        )
    if start not in experiments:
        if Path(start).is_dir():
            return
        hint = did_you_mean(start, experiments)
        raise ValueError(
            f"{place}, which is neither a run of the suite nor a folder.{hint} Runs: {', '.join(experiments)}"
        )
    own, parent = experiments[label], experiments[start]
    if "encoder" not in parent.model.stacks:
        raise ValueError(
            f"{place}, a run with model.architecture {parent.model.architecture}, without an encoder; start from "
            "another run"
        )
    if parent.data.mix != own.data.mix:
        raise ValueError(
            f"{place}, a run on the mix '{parent.data.mix.name}', which is not the mix '{own.data.mix.name}' of this "
            "run, or has other settings; train both on one mix"
        )


def _refuse_circle(starts: Mapping[str, str]) -> None:
    """Raises ConfigError if runs start from one another in a circle. ``starts`` maps a run to what it starts from."""
    for first in starts:
        circle = [first]
        while (start := starts.get(circle[-1])) is not None and start not in circle:
            circle.append(start)
        if start == first:
            told = ", ".join(f"{label} from {starts[label]}" for label in circle)
            raise ConfigError(
                f"runs start from one another in a circle: {told}; leave start.encoder out of one of them, which draws "
                "its weights then"
            )


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
