"""Pure parts: what holds for any argument, tried by hypothesis on arguments that it draws and makes small."""

from __future__ import annotations

import json
import tempfile
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from moe_testbed.data.documents import clean_text
from moe_testbed.data.tokens.pattern import largest_remainder
from moe_testbed.data.tokens.permutation import key_of, permute
from moe_testbed.launcher.config.experiment import run_name
from moe_testbed.launcher.config.yaml_text import to_yaml
from moe_testbed.launcher.config.yaml_tree import COMMAND_LINE, Node, Rules, load_file, merge, parse_overrides, to_plain
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.checkpoint_mark import checkpoint_path, read_mark
from moe_testbed.launcher.run.files import read_json, read_json_lines, read_yaml
from moe_testbed.launcher.run.records import JobEnds, MetricsLine, Status
from moe_testbed.routing import metrics

NUMBER = 1_000  # examples of each property
PROPERTIES: dict[str, Callable[[], None]] = {}

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXTS)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner), max_leaves=20)
JSON = st.recursive(
    st.one_of(SCALARS, st.just(float("nan"))), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)
)
TREES = st.recursive(SCALARS, lambda inner: st.dictionaries(st.sampled_from("abc"), inner), max_leaves=12)
LAYERS = st.dictionaries(st.sampled_from("abc"), TREES)
COUNTS_DE = st_numpy.arrays(
    np.int64, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.integers(0, 10**6)
).filter(lambda counts: bool(counts.sum(axis=1).all()))
ROUNDING = 1e-9


def a_property(function: Callable[[], None]) -> Callable[[], None]:
    """Lists a property."""
    PROPERTIES[function.__name__] = function
    return function


@a_property
@given(st.dictionaries(TEXTS.filter(lambda key: key != "include"), VALUES))
def yaml_that_was_written_is_read_as_the_same(value: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_text(to_yaml(value), encoding="utf-8", newline="")
        assert to_plain(load_file(path, Rules())) == value


@a_property
@given(st.lists(TEXTS | st.from_regex(r"[a-z.]{1,5}=.{0,12}"), max_size=3))
def overrides_are_read_or_refused_in_one_line(texts: list[str]) -> None:
    try:
        parse_overrides(texts, Rules())
    except ConfigError as error:
        assert str(error).startswith("command line: ")


@a_property
@given(LAYERS, LAYERS, LAYERS)
def layers_are_merged_key_by_key(low: dict[str, Any], middle: dict[str, Any], high: dict[str, Any]) -> None:
    one, two, three = map(_node, (low, middle, high))
    expected = _merged(_merged(low, middle), high)
    assert to_plain(merge(merge(one, two, Rules()), three, Rules())) == expected


@a_property
@given(st.permutations(["training.steps=3", "seed=2", "model.moe.top_k=1", "data.mix=a.yaml"]))
def the_order_of_overrides_does_not_change_a_runs_name(overrides: list[str]) -> None:
    class Config:
        name, seed = "one", 2

    assert run_name(Config(), overrides) == run_name(Config(), sorted(overrides))  # type: ignore[arg-type]


@a_property
@given(st.binary() | JSON.map(lambda value: json.dumps(value).encode()))
def files_of_a_run_are_read_whatever_they_hold(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = checkpoint_path(Path(folder), 7) / "complete.json"
        path.parent.mkdir()
        path.write_bytes(content)
        Status.of(read_json(path))
        JobEnds.of(read_json(path))
        read_mark(path.parent)
        read_yaml(path)
        [MetricsLine.of(line) for line in read_json_lines(path)]
        MetricsLine.of_text(content)


@a_property
@given(st.sampled_from(["state", "step", "steps", "reason", "failures", "stops", "files", "layout"]), JSON)
def records_are_read_whatever_a_key_holds(key: str, value: Any) -> None:
    Status.of({key: value})
    JobEnds.of({key: value})
    MetricsLine.of({"step": 1, key: value})


@a_property
@given(TEXTS, st.integers(0), st.none() | st.floats(0, 1e9), st.dictionaries(TEXTS, SCALARS))
def a_line_of_metrics_is_read_as_it_was_written(
    kind: str, step: int, seconds: float | None, values: dict[str, Any]
) -> None:
    own = {key: value for key, value in values.items() if key not in ("kind", "step", "seconds")}
    line = MetricsLine(kind, step, seconds, own)
    assert MetricsLine.of_text(json.dumps(line.content()).encode()) == line


@a_property
@given(TEXTS)
def cleaning_a_text_twice_changes_nothing(text: str) -> None:
    assert clean_text(clean_text(text)) == clean_text(text)


@a_property
@given(st.integers(1, 300), st.integers(0, 2**62))
def a_permutation_has_each_number_once(size: int, key: int) -> None:
    numbers = np.arange(size)
    found = permute(numbers, np.full(size, size), np.repeat(key_of(key), size))
    assert sorted(found.tolist()) == numbers.tolist()


@a_property
@given(st.lists(st.integers(0, 1000), min_size=1).filter(any), st.integers(0, 10_000))
def shares_are_rounded_to_a_whole(parts: list[int], total: int) -> None:
    shares = [Fraction(part, sum(parts)) for part in parts]
    found = largest_remainder(shares, total)
    assert sum(found) == total
    assert all(abs(one - share * total) < 1 for one, share in zip(found, shares, strict=True))


@a_property
@given(COUNTS_DE, st.randoms(use_true_random=False))
def measures_keep_their_bounds_and_know_no_order_of_experts(counts_DE: Any, generator: Any) -> None:
    domains, experts = counts_DE.shape
    order = list(range(experts))
    generator.shuffle(order)
    bounds = {
        metrics.mutual_information: (0.0, np.log(min(domains, experts))),
        metrics.purity: (1 / domains, 1.0),
        metrics.effective_experts: (1.0, experts),
        metrics.inverse_simpson: (1.0, experts),
        metrics.gini: (0.0, 1.0),
        metrics.dead_experts: (0.0, experts),
        metrics.max_violation: (0.0, experts - 1),
    }
    for measure, (low, high) in bounds.items():
        value = float(measure(counts_DE))
        assert low - ROUNDING <= value <= high + ROUNDING, (measure.__name__, value)
        shuffled = float(measure(counts_DE[:, order]))
        assert abs(shuffled - value) <= 1e-9 * max(1.0, abs(value)), (measure.__name__, value, shuffled)


@a_property
@given(COUNTS_DE, st.integers(2, 1000))
def measures_know_no_amount_of_text(counts_DE: Any, factor: int) -> None:
    for measure in (metrics.mutual_information, metrics.purity, metrics.effective_experts, metrics.gini):
        assert abs(float(measure(counts_DE * factor)) - float(measure(counts_DE))) < 1e-7, measure.__name__


def run_properties(number: int, with_seed: int, cases: Path) -> dict[str, str]:
    """Tries every property on so many arguments; returns the faults by the folder of their case."""
    found = {}
    for name, function in PROPERTIES.items():
        limits = settings(
            max_examples=number, database=None, deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
        )
        try:
            seed(with_seed)(limits(function))()
        except Exception as error:
            case = cases / f"pure-{with_seed}-{name}"
            case.mkdir(parents=True, exist_ok=True)
            (case / "fault.txt").write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            found[str(case)] = f"{name}: {' '.join(getattr(error, '__notes__', [str(error)]))}"
            print(f"{case}: {found[str(case)]}", flush=True)
    print(f"pure: seed {with_seed}, {len(PROPERTIES)} properties with {number} arguments each, {len(found)} faults")
    return found


def _node(value: Any) -> Node:
    return Node({key: _node(child) for key, child in value.items()} if isinstance(value, dict) else value, COMMAND_LINE)


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(low[key], high[key])
        for key in low.keys() & high.keys()
        if isinstance(low[key], dict) and isinstance(high[key], dict)
    }
    return {**low, **high, **both}
