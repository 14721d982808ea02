"""The same seed gives the same run, bit for bit, also when it is killed on the way."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.train import driver
from tests.train.results import assert_same_run, read_metrics

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def config(make_experiment: MakeExperiment) -> dict[str, Any]:
    """Ten steps with checkpoints after 2, 4, ... and four looks; the bias and the counts of the last step are state
    that matters."""
    training = make_experiment()["training"] | {"steps": 10, "micro_batch_size": 4}
    return make_experiment(
        training=training,
        checkpoint={"every": 2, "keep": 2},
        probe={"points": 4},
        ablation={"sequences_per_domain": 1},
    )


@pytest.fixture(scope="module")
def whole(config: dict[str, Any], run_on_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that nobody disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    run_on_ranks(driver.train, 1, config, str(run_dir))
    return run_dir


def test_the_same_seed_gives_the_same_run(
    config: dict[str, Any], whole: Path, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_on_ranks(driver.train, 1, config, str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)


def test_another_seed_gives_another_run(config: dict[str, Any], whole: Path, run_on_ranks: Run, tmp_path: Path) -> None:
    run_on_ranks(driver.train, 1, config | {"seed": 2}, str(tmp_path / "run"))
    assert read_metrics(tmp_path / "run")[0]["loss"] != read_metrics(whole)[0]["loss"]


def test_a_run_killed_after_its_last_step_is_ablated(
    config: dict[str, Any], whole: Path, run_on_ranks: Run, run_until_killed: Callable[..., None], tmp_path: Path
) -> None:
    """Its last evaluation is not at hand any more, and its analysis, half-made or whole, counts for nothing."""
    run_until_killed(driver.train_and_die, 1, config, str(tmp_path / "run"), "before the analysis is written", 1)
    assert not (tmp_path / "run" / "analysis.npz").exists()
    (tmp_path / "run" / "analysis.npz").write_bytes(b"of another process")
    run_on_ranks(driver.train, 1, config, str(tmp_path / "run"))
    assert_same_run(tmp_path / "run", whole)
    assert (whole / "analysis.npz").exists()


def draw(generator: random.Random, where: str) -> int:
    """How often a place is passed before the kill; some are passed but once."""
    return 1 if where in ("removing an old checkpoint", "before the analysis is written") else generator.randint(1, 2)


@pytest.fixture
def finished_after_kills(
    config: dict[str, Any], run_on_ranks: Run, run_until_killed: Callable[..., None], tmp_path: Path
) -> Callable[..., Path]:
    """``finished_after_kills(places, generator)`` -> folder of a run killed once at each place, and then let be."""

    def run(places: list[str], generator: random.Random) -> Path:
        run_dir = tmp_path / "run"
        for where in places:
            run_until_killed(driver.train_and_die, 1, config, str(run_dir), where, draw(generator, where))
        run_on_ranks(driver.train, 1, config, str(run_dir))
        return run_dir

    return run


@pytest.mark.parametrize("where", driver.PLACES)
def test_a_killed_run_continues_exactly(where: str, finished_after_kills: Callable[..., Path], whole: Path) -> None:
    """Killed twice at drawn times before it may end."""
    assert_same_run(finished_after_kills([where, where], random.Random(where)), whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_again_and_again_continues_exactly(
    seed: int, finished_after_kills: Callable[..., Path], whole: Path
) -> None:
    generator = random.Random(seed)
    # After the analysis there is no other place left to die at.
    places = [generator.choice(sorted(driver.PLACES.keys() - {"before the analysis is written"})) for _ in range(3)]
    assert_same_run(finished_after_kills(places, generator), whole)


@pytest.mark.parametrize(
    "damage", ["cut in half", "empty of the same size", "one bit", "a file is gone", "no mark", "other keys"]
)
def test_a_damaged_checkpoint_is_passed_over_for_an_older_one(
    damage: str,
    config: dict[str, Any],
    whole: Path,
    run_on_ranks: Run,
    run_until_killed: Callable[..., None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    run_until_killed(driver.train_and_die, 1, config, str(run_dir), "before a step", 10)
    checkpoints = sorted((run_dir / "checkpoints").glob("step_*"))
    assert [path.name for path in checkpoints] == ["step_00000006", "step_00000008"]
    weights = checkpoints[-1] / "mp_rank_00_model_states.pt"
    if damage == "cut in half":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif damage == "empty of the same size":
        weights.write_bytes(bytes(weights.stat().st_size))
    elif damage == "one bit":
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
    elif damage == "a file is gone":
        weights.unlink()
    elif damage == "other keys":
        mark = checkpoints[-1] / "complete.json"
        mark.write_text(mark.read_text().replace("ranks", "ranjs"))
    else:
        (checkpoints[-1] / "complete.json").unlink()
    capsys.readouterr()
    run_on_ranks(driver.train, 1, config, str(run_dir))
    told = capsys.readouterr().err
    assert "step_00000008 is not whole (cut off or damaged) and is passed over" in told
    assert "continuing after step 6" in told
    assert_same_run(run_dir, whole)


def test_a_leftover_does_not_push_whole_checkpoints_out(
    config: dict[str, Any], run_until_killed: Callable[..., None], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    leftover = run_dir / "checkpoints" / "step_00000099"
    leftover.mkdir(parents=True)
    run_until_killed(
        driver.train_and_die, 1, config | {"checkpoint": {"every": 2, "keep": 1}}, str(run_dir), "before a step", 4
    )
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000002"]


def train_in_parts(balance: dict[str, Any], make: MakeExperiment, run: Run, folder: Path) -> list[list[dict[str, Any]]]:
    """Training lines of the same global batches at once, and accumulated over four micro-batches."""
    lines = []
    for micro in (8, 2):
        training = make()["training"] | {"micro_batch_size": micro}
        run(driver.train, 1, make(seed=2, routing={"balance": balance}, training=training), str(folder / str(micro)))
        lines.append([line for line in read_metrics(folder / str(micro)) if line["kind"] == "train"])
    return lines


def test_accumulation_changes_nothing(make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path) -> None:
    balance = {"loss_free_bias": {"update_rate": 0.01}, "z_loss": {}}
    for whole, parts in zip(*train_in_parts(balance, make_experiment, run_on_ranks, tmp_path), strict=True):
        for key in ("loss", "cross_entropy", "gradient_norm", "balance/z_loss"):
            assert parts[key] == pytest.approx(whole[key], rel=1e-5)


@pytest.mark.parametrize("estimator", ["previous", "online"])
def test_previous_counts_make_the_balancing_loss_independent_of_accumulation(
    estimator: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """The first step has none and takes the counts so far, as ``online`` always does: hence a coefficient too small to
    move the weights, so that both trainings stay comparable."""
    balance = {"load_balancing_loss": {"coefficient": 1e-5, "scope": "global_batch", "estimator": estimator}}
    lines = train_in_parts(balance, make_experiment, run_on_ranks, tmp_path)
    for whole, parts in list(zip(*lines, strict=True))[1:]:
        assert parts["cross_entropy"] == pytest.approx(whole["cross_entropy"], rel=1e-5)
        value = pytest.approx(whole["balance/load_balancing_loss"], rel=1e-5)
        assert (parts["balance/load_balancing_loss"] == value) == (estimator == "previous")
