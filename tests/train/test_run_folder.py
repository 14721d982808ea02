"""What a training leaves in its folder, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from filelock import FileLock

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.run import environment
from tests.model.closed_forms import model_size
from tests.train import driver
from tests.train.results import read_evaluations, read_metrics, read_weights

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

# The accumulation of cross-entropies in float32 on the way to metrics.jsonl.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def trained(make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of six steps with evaluations after steps 3 and 6, and an ablation; by a user whose
    files everybody may write."""
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    run_on_ranks(driver.train_without_umask, 1, make_experiment(ablation={"sequences_per_domain": 1}), str(run_dir))
    return run_dir


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_training_does_not_import_torchs_compiler(
    zero_stage: int, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    config = make_experiment(training={"zero_stage": zero_stage})
    (modules,) = run_on_ranks(driver.train_and_list_modules, 1, config, str(tmp_path / "run"))
    assert "deepspeed" in modules
    assert {"torch._dynamo", "torch._inductor", "mlflow"} & {*modules} == set()


def test_what_code_is_taken_from_is_written_for_its_owner_alone(trained: Path) -> None:
    checkpoints = list((trained / "checkpoints").rglob("*"))
    assert len([path for path in checkpoints if path.is_file()]) > 2
    for path in (trained, trained / "config.yaml", trained / "checkpoints", *checkpoints):
        assert path.stat().st_mode & 0o022 == 0, path
    assert (trained / "metrics.jsonl").stat().st_mode & 0o022 == 0o022


def test_files_are_those_of_the_contract(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "config.yaml",
        "metrics.jsonl",
        "evaluations",
        "statistics",
        "analysis.npz",
        "manifest.json",
        "summary.json",
        "status.json",
        "checkpoints",
        ".lock",
    }
    assert read_json(trained / "status.json") == {"state": "finished", "step": 6, "steps": 6, "reason": None}
    assert set(read_json(trained / "manifest.json")["domains"]) == {"latin", "greek", "digits"}


def test_the_resolved_config_is_written(trained: Path, make_experiment: MakeExperiment) -> None:
    written = yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8"))
    given = make_experiment(ablation={"sequences_per_domain": 1})
    assert ExperimentConfig.model_validate(written) == ExperimentConfig.model_validate(given)


def test_metrics_tell_every_step_once_and_in_order(trained: Path) -> None:
    lines = read_metrics(trained)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [3, 6]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in lines:
        if line["kind"] == "train":
            # Two layers; coefficients of the config and of z_loss's default.
            balance = 2 * (0.1 * line["balance/load_balancing_loss"] + 1e-3 * line["balance/z_loss"])
            assert line["loss"] == pytest.approx(line["cross_entropy"] + balance, rel=1e-6)


def test_the_learning_rate_warms_up_and_falls(trained: Path) -> None:
    rates = [line["learning_rate"] for line in read_metrics(trained) if line["kind"] == "train"]
    cosine = [0.5 * (1 + np.cos(np.pi * done / 3)) for done in range(4)]
    assert rates == pytest.approx([0.005, 0.01, *[0.01 * (0.1 + 0.9 * value) for value in cosine]])


def test_evaluations_agree_with_the_metrics_and_themselves(trained: Path, make_experiment: MakeExperiment) -> None:
    lines = {line["step"]: line for line in read_metrics(trained) if line["kind"] == "evaluation"}
    evaluations = read_evaluations(trained)
    assert list(evaluations) == ["step_00000003.npz", "step_00000006.npz"]
    for arrays in evaluations.values():
        line = lines[int(arrays["step"])]
        losses = arrays["loss_sum_D"] / arrays["tokens_D"]
        assert line["cross_entropy"] == pytest.approx(losses.mean(), rel=TOLERANCE)
        for domain, loss in zip(arrays["domains"], losses, strict=True):
            assert line[f"cross_entropy/{domain}"] == pytest.approx(loss, rel=TOLERANCE)
        for d in range(3):
            of_domain = arrays["sequence_loss_N"][arrays["sequence_domain_N"] == d]
            assert of_domain.mean() == pytest.approx(losses[d], rel=TOLERANCE)
        # Every token chooses two experts in each of two layers.
        assert arrays["tokens_D"].tolist() == [80, 80, 80]
        np.testing.assert_array_equal(arrays["counts_top_1_YDE"].sum(2), [[80] * 3] * 2)
        np.testing.assert_array_equal(arrays["counts_top_k_YDE"].sum(2), [[160] * 3] * 2)
        np.testing.assert_array_equal(arrays["shuffled_counts_top_k_YDE"].sum((1, 2)), [480, 480])
        assert (arrays["counts_top_1_YDE"] <= arrays["counts_top_k_YDE"]).all()
        assert not arrays["dropped_YDE"].any()


def test_the_summary_tells_sizes_and_surroundings(trained: Path, make_experiment: MakeExperiment) -> None:
    summary = read_json(trained / "summary.json")
    config = ExperimentConfig.model_validate(make_experiment())
    assert summary["tokens"] == 6 * 8 * 16
    assert {key: summary[key] for key in ("parameters", "active_parameters", "flops_per_token")} == model_size(
        config.model, 512, 16, router_parameters=2 * 16 * 8
    )
    saved = read_weights(trained)
    assert summary["parameters"] == sum(w.numel() for name, w in saved.items() if not name.startswith("balancing."))
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    assert summary["peak_memory_bytes"] > 0
    assert {"python", "torch", "deepspeed"} <= set(summary["versions"])
    assert {"hardware", "command"} <= set(summary)
    assert ("commit" in summary) == (environment.commit() is not None)


def test_training_lowers_the_loss_of_every_domain(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    training = make_experiment()["training"] | {"steps": 40, "learning_rate": 0.02}
    run_on_ranks(driver.train, 1, make_experiment(training=training, evaluation={"every": 20}), str(tmp_path / "run"))
    first, last = read_evaluations(tmp_path / "run").values()
    assert (last["loss_sum_D"] < first["loss_sum_D"]).all()
    assert (last["loss_sum_D"] / last["tokens_D"] < np.log(512) - 1).all()


def test_bfloat16_is_close_to_float32(
    trained: Path,
    make_experiment: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    training = make_experiment()["training"] | {"precision": "bfloat16"}
    run_on_ranks(driver.train, 1, make_experiment(training=training), str(tmp_path / "run"))
    assert "bf16_optimizer" not in "".join(capfd.readouterr()), "what DeepSpeed prints for itself"
    for rounded, exact in zip(read_metrics(tmp_path / "run"), read_metrics(trained), strict=True):
        # Choices of experts differ where scores are close.
        assert rounded["cross_entropy"] == pytest.approx(exact["cross_entropy"], rel=0.02)
        if rounded["kind"] == "train":
            assert rounded["learning_rate"] == exact["learning_rate"]


def test_a_folder_of_another_config_is_refused_and_left_alone(
    trained: Path, make_experiment: MakeExperiment, run_on_ranks: Run
) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    changed = make_experiment(training=make_experiment()["training"] | {"learning_rate": 0.5}, seed=2)
    with pytest.raises(AssertionError, match=r"ConfigError: .*run holds a run that differs in seed, training; choose"):
        run_on_ranks(driver.train, 1, changed, str(trained))
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before


def test_what_decides_nothing_may_change(trained: Path, make_experiment: MakeExperiment, run_on_ranks: Run) -> None:
    metrics = (trained / "metrics.jsonl").read_bytes()
    run_on_ranks(driver.train, 1, make_experiment(checkpoint={"every": 2, "keep": 3}), str(trained))
    assert (trained / "metrics.jsonl").read_bytes() == metrics
    assert read_json(trained / "status.json")["state"] == "finished"


def test_a_finished_run_is_left_as_it_is(
    trained: Path, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    # Without its checkpoint a run would start anew, if it were not finished.
    shutil.rmtree(run_dir / "checkpoints")
    before = {path.name: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.suffix != ".yaml"}
    run_on_ranks(driver.train, 1, make_experiment(), str(run_dir))
    assert {path.name: path.read_bytes() for path in run_dir.rglob("*") if path.name in before} == before


def test_a_run_does_not_continue_on_other_data(
    trained: Path, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained, run_dir)
    manifest = read_json(run_dir / "manifest.json")
    del manifest["domains"]["greek"]
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        AssertionError, match=r"ConfigError: .*on other data \(domains then: latin, digits; now: latin,"
    ):
        run_on_ranks(driver.train, 1, make_experiment(), str(run_dir))


def test_two_trainings_cannot_share_a_folder(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with (
        FileLock(run_dir / ".lock"),
        pytest.raises(AssertionError, match=r"ConfigError: .*run is in use by another process"),
    ):
        run_on_ranks(driver.train, 1, make_experiment(), str(run_dir))


def test_ranks_that_cannot_share_the_experts_are_refused(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    with pytest.raises(
        AssertionError, match=r"expert_parallel_size is 2, which does not divide the number of ranks, 1"
    ):
        run_on_ranks(driver.train, 1, make_experiment(parallel={"expert_parallel_size": 2}), str(tmp_path / "run"))


def test_a_failed_run_says_where_and_why(make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="RuntimeError: the reason"):
        run_on_ranks(driver.train_and_fail, 1, make_experiment(), str(tmp_path / "run"), 3)
    status = read_json(tmp_path / "run" / "status.json")
    assert status == {"state": "failed", "step": 2, "steps": 6, "reason": "RuntimeError: the reason"}
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_full_disk_is_told_in_one_line_and_loses_nothing(
    make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(
        AssertionError, match=r"CheckpointError: .*could not be written, [\d,]+ bytes are free there; make"
    ):
        run_on_ranks(driver.train_on_a_full_disk, 1, make_experiment(), str(run_dir))
    assert read_json(run_dir / "status.json")["reason"].startswith("CheckpointError: ")
    run_on_ranks(driver.train, 1, make_experiment(), str(run_dir))
    assert read_json(run_dir / "status.json")["state"] == "finished"


def test_a_large_seed_trains(make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path) -> None:
    training = make_experiment()["training"] | {"steps": 1, "warmup_steps": 0}
    run_on_ranks(driver.train, 1, make_experiment(seed=20_260_101, training=training), str(tmp_path / "run"))


@pytest.mark.parametrize("router", ["hash", "random", "reference", "permuted_reference", "sigmoid"])
def test_routers_train(router: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path) -> None:
    routing = {"router": {"name": router}, "balance": {}}
    run_on_ranks(driver.train, 1, make_experiment(routing=routing), str(tmp_path / "run"))
    (counts_YDE,) = {
        name: arrays["counts_top_k_YDE"] for name, arrays in read_evaluations(tmp_path / "run").items() if "06" in name
    }.values()
    if router == "reference":
        # Groups of 3, 3 and 2 experts: no domain uses another's.
        for domain, own in enumerate([slice(0, 3), slice(3, 6), slice(6, 8)]):
            assert counts_YDE[:, domain, own].sum() == counts_YDE[:, domain].sum() == 320
    else:
        assert (counts_YDE.sum(2) == 160).all()


@pytest.mark.slow
def test_the_command_line_trains_and_tells_errors_in_one_line(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(make_experiment()), encoding="utf-8")

    def train(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "moe_testbed.launcher", "train", "experiment.yaml", "--run-dir", "trial"]
        command += arguments
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    done = train("training.steps=2", "evaluation.every=0")
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "trial"
    assert read_json(run_dir / "status.json")["state"] == "finished"
    assert read_json(run_dir / "summary.json")["command"].startswith("moe-testbed train experiment.yaml")
    refused = train("training.steps=3", "evaluation.every=0")
    assert refused.returncode == 2
    assert refused.stderr.strip().splitlines()[-1].startswith("moe-testbed: trial holds a run that differs in training")
    assert "Traceback" not in refused.stderr
