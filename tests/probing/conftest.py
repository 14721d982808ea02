"""Runs and tasks that the tests of this folder share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed import corpus
from tests.processes.python import run_python

TrainRun = Callable[..., Path]
ENCODER = {"model": {"architecture": "encoder"}, "objective": {"name": "masked"}}
SEQ2SEQ = {"model": {"architecture": "encoder_decoder"}, "objective": {"name": "denoising"}}


@pytest.fixture(scope="session")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The ``data`` part of a config, its token store built."""
    return corpus.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def train_run(own_data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    """``train_run(parts, **model)``: the folder of a trained run; the same one for the same parts."""
    made: dict[str, Path] = {}

    def train(parts: Mapping[str, Any], **more: Mapping[str, Any]) -> Path:
        whole = {key: {**parts.get(key, {}), **more.get(key, {})} for key in {**parts, **more}}
        if (key := repr(whole)) not in made:
            folder = tmp_path_factory.mktemp("runs")
            config = corpus.make_experiment(own_data, **whole)
            (folder / "experiment.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
            command = ["-m", "moe_testbed.launcher", "train", str(folder / "experiment.yaml")]
            run_python(*command, "--run-dir", str(folder / "tiny-seed1")).check_returncode()
            made[key] = folder / "tiny-seed1"
        return made[key]

    return train


def word(generator: random.Random, language: str) -> str:
    """A word of an invented language."""
    return "".join(generator.choices(corpus.ALPHABETS[language], k=generator.randint(2, 4)))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of three tasks: in the text of which language a number stands, the language of a text, and texts to
    write backwards."""
    folder, generator = tmp_path_factory.mktemp("tasks"), random.Random(2)
    for number in range(40):
        lines = []
        for _ in range(6):
            language = generator.choice(["latin", "greek"])
            sentence = [(word(generator, language), "_") for _ in range(6)]
            for place in (3, 5):
                sentence.insert(place, (word(generator, "digits"), language))
            rows = enumerate(sentence, start=1)
            lines.append("\n".join("\t".join([str(at), form, "_", tag, *"______"]) for at, (form, tag) in rows))
        (folder / f"{number:02}.conllu").write_text("\n\n".join(lines) + "\n")
        verses = [" ".join(word(generator, "latin") for _ in range(2)) for _ in range(4)]
        content = {"verses": [{"text": verse, "translation": verse[::-1]} for verse in verses]}
        (folder / f"{number:02}.json").write_text(json.dumps(content))
    names = list(corpus.ALPHABETS)
    labelled = [
        f"{name}\t{' '.join(''.join(generator.choices(corpus.ALPHABETS[name], k=4)) for _ in range(5))}"
        for _ in range(40)
        for name in names
    ]
    (folder / "lines.txt").write_text("\n".join(labelled))

    def write(name: str, glob: str, **parts: Any) -> Path:
        path = folder / f"{name}.yaml"
        sources = [{"kind": "files", "glob": f"{folder}/{glob}"}]
        learning = {"epochs": 2, "rates": [0.003, 0.01], "seeds": [1, 2]}
        split = {"kind": "random", "test": 0.25}
        task = {"name": name, "sources": sources, "split": split, "learning": learning, **parts}
        path.write_text(yaml.safe_dump(task, sort_keys=False))
        return path

    return {
        "around": write("around", "*.conllu", kind="token", metric="accuracy", reader={"kind": "conllu"}),
        "language": write("language", "lines.txt", kind="sequence", metric="macro_f1", reader="labelled_lines"),
        "reversed": write("reversed", "*.json", kind="generation", metric="chrf", reader={"kind": "verse_pairs"}),
    }
