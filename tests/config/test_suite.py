"""Suites: their runs, and what the command line does to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.config.experiment import dump_config
from moe_testbed.launcher.config.suite import load_suite, suite_runs
from moe_testbed.launcher.config.yaml_tree import embedded_configs
from moe_testbed.launcher.errors import ConfigError

Write = Callable[[str, str], Path]
SUITE = """
    name: pair
    experiment: ../small.yaml
    overrides:
      routing.balance: none
    seeds: [1, 2]
    reference: [ideal]
    control: blind
    runs:
      ideal: {description: Best., overrides: {routing.router: {name: reference}}}
      blind: {overrides: {routing: {router: {name: permuted_reference}}, training.steps: 6}}
"""


@pytest.fixture
def suite_file(experiment: Path, write: Write) -> Path:
    return write("suites/pair.yaml", SUITE)


def test_runs_are_the_experiment_under_the_suites_and_their_own_overrides(suite_file: Path) -> None:
    runs = suite_runs(load_suite(suite_file), Path("runs"))
    assert [str(run.run_dir) for run in runs] == [
        "runs/pair/ideal-seed1",
        "runs/pair/blind-seed1",
        "runs/pair/ideal-seed2",
        "runs/pair/blind-seed2",
    ]
    ideal, blind, *_ = (run.config for run in runs)
    assert (ideal.name, ideal.seed, ideal.routing.router.name, ideal.training.steps) == ("ideal", 1, "reference", 4)
    assert (blind.name, blind.seed, blind.routing.router.name, blind.training.steps) == (
        "blind",
        1,
        "permuted_reference",
        6,
    )
    assert ideal.routing.balance == {}


def test_the_command_line_is_above_the_runs_and_reaches_the_suites_own_keys(suite_file: Path, write: Write) -> None:
    suite = load_suite(suite_file, ["training.steps=9", "seeds=[5]", "name=other"])
    runs = suite_runs(suite, Path("runs"))
    assert {run.config.training.steps for run in runs} == {9}
    assert [run.name for run in runs] == ["ideal-seed5", "blind-seed5"]
    write("resolved.yaml", dump_config(suite.config))
    again = suite_runs(load_suite("resolved.yaml"), Path("runs"))
    assert [run.config for run in again] == [run.config for run in runs]


@pytest.mark.parametrize("name", sorted(path.name for path in (embedded_configs() / "suites").glob("*.yaml")))
def test_embedded_suites_load(write: Write, name: str) -> None:
    write("empty.yaml", "")
    suite = load_suite(f"configs/suites/{name}")
    # A sweep chooses a setting, runs without experts have no routing, and losses of different tasks do not compare; the
    # others tell how far a router is from the reference.
    sweep = {run.evaluation.split for run in suite.experiments.values()} == {"tuning"}
    dense = all(run.model.dense_baseline for run in suite.experiments.values())
    tasks = {(run.model.architecture, run.objective.name) for run in suite.experiments.values()}
    assert sweep or dense or len(tasks) > 1 or (suite.config.control in suite.config.runs and suite.config.reference)
    assert all(run.description for run in suite.config.runs.values())


def test_the_runs_of_the_demo_train_alike() -> None:
    runs = suite_runs(load_suite("suites/demo.yaml"), Path("runs"))
    assert len(runs) == 8
    different = {"name", "routing"}
    configs = [run.config.model_dump(exclude=different) for run in runs]
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("control=blin", "control names 'blin', which is no run. Did you mean 'blind'? Runs: ideal, blind"),
        ("reference=[idle]", "reference names 'idle', which is no run"),
        ("seeds=[1, 1]", "seeds is [1, 1]: each must be there once and be at least 0"),
        ("overrides.seed=3", "overrides sets 'seed', which is each run's own; use seeds"),
        ("seeds=[]", "seeds is []: tuple should have at least 1 item"),
        ("seed=[1]", "command line: 'seed=[1]': a suite trains its runs with several seeds; use seeds=[...]"),
        ("runs.a/b={}", "the label 'a/b' in runs names a folder"),
        ("runs.ideal.override={}", "unknown key 'runs.ideal.override'. Did you mean 'overrides'?"),
        (
            "runs.ideal.overrides={routing.router.groops: equal}",
            "unknown key 'routing.router.groops'. Did you mean 'groups'?",
        ),
        ("trainings.steps=3", "'trainings' is a key of neither a suite nor an experiment. Did you mean 'training'?"),
        ("experiment=none.yaml", "command line: there is no file 'none.yaml'"),
        ("training.steps", "command line: expected KEY=VALUE"),
    ],
)
def test_bad_suites_get_one_clear_line(suite_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_suite(suite_file, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_old_keys_of_a_suite_load_and_are_written_under_their_new_names(suite_file: Path, write: Write) -> None:
    renamed = SUITE.replace(
        "training.steps: 6", "training.steps: 6, statistics.points: 5, probe.sequences_per_domain: 2"
    )
    with pytest.raises(ConfigError, match=r"statistics is the old name of probe, which is given too"):
        load_suite(write("suites/both.yaml", renamed))
    old = SUITE.replace("routing.balance: none", "{routing.balance: none, routing: {pool: first_m}}")
    suite = load_suite(write("suites/old.yaml", old), ["statistics.points=3", "examination.sequences_per_domain=0"])
    new = SUITE.replace("routing.balance: none", "{routing.balance: none, routing: {pooling: first_m}}")
    same = load_suite(write("suites/new.yaml", new), ["probe.points=3", "ablation.sequences_per_domain=0"])
    assert suite.experiments == same.experiments
    assert suite.config.runs == same.config.runs
    write("resolved.yaml", dump_config(suite.config))
    assert load_suite("resolved.yaml").experiments == suite.experiments


STAGES = """
    name: stages
    experiment: ../small.yaml
    overrides: {model.architecture: encoder, objective: masked}
    seeds: [1, 2]
    runs:
      mlm: {}
      more: {overrides: {start.encoder.run: mlm}}
      last: {overrides: {start.encoder.run: more}}
"""


def test_a_label_is_the_run_of_the_same_seed_and_a_folder_is_no_run_of_the_suite(
    experiment: Path, write: Write
) -> None:
    suite = load_suite(write("suites/stages.yaml", STAGES))
    assert {run.name: run.parents for run in suite_runs(suite, Path("runs"))} == {
        "mlm-seed1": (),
        "more-seed1": ("mlm-seed1",),
        "last-seed1": ("more-seed1",),
        "mlm-seed2": (),
        "more-seed2": ("mlm-seed2",),
        "last-seed2": ("more-seed2",),
    }
    Path("former").mkdir()
    runs = suite_runs(
        load_suite("suites/stages.yaml", ["runs.more.overrides={start.encoder.run: former}"]), Path("runs")
    )
    assert {run.label: run.parents for run in runs if run.seed == 1}["more"] == ()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "runs.more.overrides={start.encoder.run: mml}",
            "run 'more' of the suite 'stages': command line: start.encoder.run is 'mml', which is neither a run of the "
            "suite nor a folder. Did you mean 'mlm'? Runs: mlm, more, last",
        ),
        (
            "runs.more.overrides={start.encoder.run: runs/former-seed1}",
            "start.encoder.run is 'runs/former-seed1', which is neither a run of the suite nor a folder. Runs: mlm",
        ),
        (
            "runs.more.overrides={start.encoder.run: more}",
            "run 'more' of the suite 'stages': command line: start.encoder.run is 'more', the run itself; name another",
        ),
        (
            "runs.mlm.overrides={start.encoder.run: last}",
            "runs start from one another in a circle: mlm from last, last from more, more from mlm; leave "
            "start.encoder out of one of them",
        ),
        (
            "runs.mlm.overrides={model.architecture: causal, objective: next_token}",
            "run 'more' of the suite 'stages': suites/stages.yaml:7: start.encoder.run is 'mlm', a run with "
            "model.architecture causal, without an encoder",
        ),
        (
            "runs.mlm.overrides={data.mix.vocab_size: 1024}",
            "start.encoder.run is 'mlm', a run on the mix 'two', which is not the mix 'two' of this run, or has other "
            "settings; train both on one mix",
        ),
    ],
)
def test_a_start_from_nowhere_is_one_clear_line(experiment: Path, write: Write, override: str, message: str) -> None:
    file = write("suites/stages.yaml", STAGES)
    with pytest.raises(ConfigError) as caught:
        load_suite(file, [override])
    assert message in str(caught.value) and "\n" not in str(caught.value)
