"""`moe-testbed analyze` from the command line: what it writes, and one line for whatever is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from moe_testbed.launcher.analyze import analyze, hub_model
from moe_testbed.launcher.analyze.hub_analysis import HubAnalysis
from moe_testbed.launcher.analyze.request import Request
from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.config.mix import load_mix
from moe_testbed.launcher.errors import CheckpointError, ConfigError
from moe_testbed.launcher.ranks.rendezvous import choose_device
from tests.analyze import models
from tests.analyze.conftest import Analyze
from tests.processes.python import run_python


def run_here(
    checkpoints: list[Path | str], mix: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object
) -> int:
    """The command without a process of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    request = Request(load_mix(mix), choose_device("cpu"), cache_dir=out.parent / "cache", **options)  # type: ignore[arg-type]
    return analyze.analyze([str(checkpoint) for checkpoint in checkpoints], request, out)


def test_a_checkpoint_becomes_a_report(analyze: Analyze, checkpoint: Path, alphabets_mix: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--out", out, "--cache-dir", tmp_path / "cache", "--sequence-length", 16]
    done = analyze("--checkpoint", checkpoint, "--mix", alphabets_mix, *options)
    assert done.returncode == 0, done.stderr
    assert "padding and special tokens are not counted" in done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {out / 'report.html'}"
    suite = yaml.safe_load((out / "suite.yaml").read_text())
    assert suite["runs"] == {"mixtral": {"description": "mixtral, 2 MoE layers of 8 experts, top-2"}}
    assert "reference" not in suite and "control" not in suite
    run = out / "mixtral-seed1"
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] > summary["active_parameters"] > 0
    assert "transformers" in summary["versions"] and summary["command"].startswith("moe-testbed analyze")
    manifest = json.loads((run / "manifest.json").read_text())
    assert [domain["licence"] for domain in manifest["domains"].values()] == ["ours"] * 4
    with np.load(run / "evaluations" / "step_00000000.npz") as arrays:
        assert arrays["domains"].tolist() == list(models.ALPHABETS)
        assert int(arrays["tokens_D"].sum()) == summary["evaluated_tokens"]
        per_domain = [arrays["cluster_counts_YCE"][:, arrays["cluster_domain_C"] == d].sum(1) for d in range(4)]
        np.testing.assert_array_equal(np.stack(per_domain, 1), arrays["counts_top_k_YDE"])
    assert (out / "report.html").stat().st_size > 10_000


def test_one_of_several_fails(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"nothing")
    out = tmp_path / "report"
    assert run_here([broken, checkpoint], alphabets_mix, out, monkeypatch, sequence_length=16) == 1
    assert f"{broken} cannot be loaded" in capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert len(results["runs"]) == 2
    status = json.loads((out / "broken-seed1" / "status.json").read_text())
    assert status["state"] == "failed" and "cannot be loaded" in status["reason"]
    assert "cannot be loaded" in (out / "report.html").read_text()


def broken_checkpoints(checkpoint: Path, folder: Path) -> dict[str, tuple[Path | str, str]]:
    """What can be wrong with a checkpoint: its path, and what is said."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(checkpoint, folder / name))

    def edit(name: str, **changes: object) -> Path:
        path = copy(name)
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        return path

    cut, empty, bare, wordless = copy("cut"), folder / "empty", copy("bare"), copy("wordless")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    empty.mkdir()
    (bare / "model.safetensors").unlink()
    for path in (*wordless.glob("tokenizer*"), *wordless.glob("special_tokens*")):
        path.unlink()
    no_json = copy("no_json")
    (no_json / "config.json").write_text("{")
    suite = folder / "suite"
    suite.mkdir()
    (suite / "suite.yaml").write_text("runs: {}")
    supported = "supported are deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen2_moe, qwen3_moe"
    return {
        "dense": (edit("dense", model_type="llama"), f"type 'llama', which is dense or not supported; {supported}"),
        "unknown": (edit("unknown", model_type="moon_moe"), f"type 'moon_moe', which is dense or not.*{supported}"),
        "cut": (cut, "cut cannot be loaded, model.safetensors is cut off .*: download it again"),
        "no weights": (bare, "bare cannot be loaded .*: download it again"),
        "missing layers": (edit("taller", num_hidden_layers=3), "taller is not whole: .* weights are missing, such as"),
        "other sizes": (
            edit("wider", hidden_size=64),
            r"wider cannot be loaded, .* is \[.*32.*\] in the file and \[.*64.*\] by",
        ),
        "no tokenizer": (
            wordless,
            r"wordless has no tokenizer that can be loaded \(no tokenizer.json, .*: give another one with",
        ),
        "config cut off": (no_json, "no_json cannot be read"),
        "empty folder": (empty, "empty holds no checkpoint: neither config.json .* nor config.yaml"),
        "a suite": (suite, "suite is a suite's folder; name the runs in it"),
        "no folder": (folder / "nowhere" / "at" / "all", "there is no folder .*OWNER/NAME"),
        "not on the hub": (
            "nobody/nothing",
            "nobody/nothing cannot be read .*check the path, or the name and the network",
        ),
    }


CASES = (
    "dense", "unknown", "cut", "no weights", "missing layers", "other sizes", "no tokenizer", "config cut off",
    "empty folder", "a suite", "no folder", "not on the hub",
)  # fmt: skip


@pytest.fixture(scope="module")
def broken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path | str, str]]:
    return broken_checkpoints(checkpoint, tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.network] if case == "not on the hub" else []) for case in CASES]
)
def test_a_broken_checkpoint_is_one_line(
    case: str, broken: dict[str, tuple[Path | str, str]], alphabets_mix: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, said = broken[case]
    with pytest.raises(CheckpointError, match=said):
        run_here([path], alphabets_mix, tmp_path / "report", monkeypatch, sequence_length=16)
    assert not (tmp_path / "report").exists()


def test_one_line_and_status_2(analyze: Analyze, alphabets_mix: Path, tmp_path: Path) -> None:
    done = analyze("--checkpoint", tmp_path, "--mix", alphabets_mix, "--out", tmp_path / "report")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"moe-testbed: {tmp_path} holds no checkpoint")
    assert "Traceback" not in done.stderr


def test_a_labelled_set_is_shown_and_not_trained_on(
    alphabets_mix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "show", str(alphabets_mix), "--cache-dir", str(tmp_path)]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[:2] for row in table[1:5]] == [[name, "6"] for name in models.ALPHABETS]
    experiment = ["configs/experiments/tiny.yaml", f"data.mix={alphabets_mix}", f"data.cache_dir={tmp_path}"]
    assert main(["train", *experiment, "--run-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("moe-testbed: the mix 'alphabets' is for evaluation only")


def test_without_transformers_the_command_says_how_to_get_it(alphabets_mix: Path, checkpoint: Path) -> None:
    arguments = ["analyze", "--checkpoint", str(checkpoint), "--mix", str(alphabets_mix)]
    script = (
        "import sys\nsys.modules['transformers'] = None\n"
        f"from moe_testbed.launcher.cli.main import main\nsys.exit(main({arguments!r}))"
    )
    done = run_python("-c", script)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "moe-testbed: checkpoints of the hub's format need transformers, which is not installed; "
        "pip install 'moe-testbed[checkpoints]'"
    )


def test_a_transformers_without_the_model_type_says_so(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Old:
        """As transformers, with a list of models that has no Mixtral."""

        CONFIG_MAPPING = frozenset({"llama"})
        __version__ = "5.0.0"
        PretrainedConfig = models.transformers.PretrainedConfig

    monkeypatch.setattr(hub_model, "import_transformers", lambda: Old)
    with pytest.raises(CheckpointError, match=r"transformers 5.0.0 does not know the model type 'mixtral'.*--upgrade"):
        run_here([checkpoint], alphabets_mix, tmp_path / "report", monkeypatch)


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = models.make_tokenizer()
    tokenizer.add_tokens(["ab", "cd"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"has 37 pieces, the model only 35 embeddings"):
        run_here([checkpoint], alphabets_mix, tmp_path / "out", monkeypatch, tokenizer=str(tmp_path / "tokenizer"))


def test_runs_and_models_of_the_hub_do_not_mix(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"run is one of our runs and .*mixtral a model of the hub's format"):
        run_here([tmp_path / "run", checkpoint], alphabets_mix, tmp_path / "report", monkeypatch)


@pytest.mark.parametrize("name, content", [("suite.yaml", "experiment: a.yaml\nruns: {}"), ("config.yaml", "{}")])
def test_trainings_are_not_overwritten(
    name: str, content: str, checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match="holds trainings, which an analysis must not overwrite"):
        run_here([checkpoint], alphabets_mix, tmp_path, monkeypatch)


def test_a_training_is_not_overwritten_by_its_own_analysis(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    folder = out / f"{checkpoint.name}-seed1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: tiny\n")
    with pytest.raises(ConfigError, match="holds trainings, which an analysis must not overwrite"):
        run_here([checkpoint], alphabets_mix, out, monkeypatch)
    assert (folder / "checkpoints").is_dir()


@pytest.mark.parametrize(
    "paths, names",
    [
        (["a/x-seed1", "a/x-seed2"], [("x", 1), ("x", 2)]),
        (["a/x-seed1", "a/y-seed2"], [("x-seed1", 1), ("y-seed2", 1)]),
        (["a/x-seed1", "b/x-seed1"], [("x-seed1", 1), ("x-seed1-2", 1)]),
        (["OWNER/a model"], [("a-model", 1)]),
    ],
)
def test_labels_and_seeds_come_from_the_folders(paths: list[str], names: list[tuple[str, int]]) -> None:
    assert analyze._names(paths) == names


def test_losses_of_different_tokenizers_are_not_compared(
    checkpoint: Path, alphabets_mix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tokenizer = models.make_tokenizer()
    tokenizer.add_tokens(["ab"])
    other = models.save(models.make_model("olmoe", vocab_size=models.VOCAB_SIZE + 1), tmp_path / "olmoe", tokenizer)
    said = "the checkpoints have different tokenizers: their losses are per token and cannot be compared"
    assert run_here([checkpoint, other], alphabets_mix, tmp_path / "two", monkeypatch, sequence_length=16) == 0
    assert said in capsys.readouterr().err
    assert run_here([checkpoint, checkpoint], alphabets_mix, tmp_path / "one", monkeypatch, sequence_length=16) == 0
    assert said not in capsys.readouterr().err


def test_all_checkpoints_read_the_same_passages(checkpoint: Path, alphabets_mix: Path, tmp_path: Path) -> None:
    request = Request(load_mix(alphabets_mix), choose_device("cpu"), sequence_length=16, cache_dir=tmp_path)
    other = models.save(models.make_model("olmoe"), tmp_path / "olmoe", models.make_tokenizer(adds_bos=False))
    analyse = HubAnalysis(request)
    one, two = analyse(str(checkpoint)), analyse(str(other))
    for name in ("sequence_domain_N", "sequence_cluster_N", "cluster_domain_C"):
        np.testing.assert_array_equal(getattr(one.evaluation, name), getattr(two.evaluation, name))
    assert one.manifest == two.manifest
