"""Trainings in stages: what starts from another run has its weights, what is frozen does not move, and what is killed
goes on bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_testbed.launcher.checkpoint.weights import model_state
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.folder import RunFolder
from tests.train import driver
from tests.train.results import assert_same_run, read_metrics, read_weights

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

# Everything that could move an expert without a gradient.
ROUTING = {
    "router": {"name": "noisy_top_k"},
    "balance": {
        "load_balancing_loss": {"coefficient": 0.1, "scope": "global_batch"},
        "loss_free_bias": {"update_rate": 0.01},
    },
}
STEPS, FROZEN = 6, 3


@pytest.fixture(scope="module")
def make_stage(make_experiment: MakeExperiment) -> MakeExperiment:
    """The config of an encoder, or of an encoder-decoder that starts from one."""

    def make(architecture: str, **parts: Any) -> dict[str, Any]:
        base = make_experiment()
        objective = {"encoder": "masked", "encoder_decoder": "denoising"}[architecture]
        model = base["model"] | {"architecture": architecture} | parts.pop("model", {})
        training = base["training"] | {"steps": STEPS, "weight_decay": 0.3, "gradient_clipping": 0.5}
        training |= parts.pop("training", {})
        return make_experiment(
            **{
                "model": model,
                "training": training,
                "objective": {"name": objective},
                "routing": ROUTING,
                "checkpoint": {"every": 1, "keep": STEPS},
                "ablation": {"sequences_per_domain": 1},
                **parts,
            }
        )

    return make


@pytest.fixture(scope="module")
def parent(make_stage: MakeExperiment, run_on_ranks: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an encoder."""
    run_dir = tmp_path_factory.mktemp("parent") / "mlm"
    run_on_ranks(driver.train, 1, make_stage("encoder"), str(run_dir))
    return run_dir


@pytest.fixture(scope="module")
def make_child(make_stage: MakeExperiment, parent: Path) -> MakeExperiment:
    """The config of an encoder-decoder that starts from it, frozen for the first half."""

    def make(**parts: Any) -> dict[str, Any]:
        start = {"encoder": {"run": str(parent)}} | parts.pop("start", {})
        freeze = parts.pop("freeze", {"encoder": {"until": FROZEN / STEPS, "warmup_steps": 2}})
        return make_stage("encoder_decoder", start=start, freeze=freeze, **parts)

    return make


def weights_after(run_dir: Path, step: int) -> dict[str, Tensor]:
    return model_state(run_dir / "checkpoints" / f"step_{step:08d}")


def still(name: str) -> bool:
    return name.startswith(("encoder.", "embedding."))


def layouts() -> list[Any]:
    found = []
    for zero_stage in (0, 1, 2):
        for precision in ("float32", "bfloat16"):
            for ranks, expert_parallel_size in ((1, 1), (2, 1), (2, 2)):
                if zero_stage == 0 and precision == "bfloat16":
                    continue
                marks = [] if zero_stage == 1 or (ranks, zero_stage) == (1, 0) else [pytest.mark.slow]
                name = f"zero{zero_stage}-{precision}-{ranks}-{expert_parallel_size}"
                found.append(pytest.param(zero_stage, precision, ranks, expert_parallel_size, marks=marks, id=name))
    return found


@pytest.mark.parametrize(("zero_stage", "precision", "ranks", "expert_parallel_size"), layouts())
def test_what_is_frozen_does_not_move_by_one_bit_and_moves_after_that(
    zero_stage: int,
    precision: str,
    ranks: int,
    expert_parallel_size: int,
    make_child: MakeExperiment,
    parent: Path,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    clipping = 0.0 if zero_stage == 0 and expert_parallel_size > 1 else 0.5
    config = make_child(
        training={"zero_stage": zero_stage, "precision": precision, "gradient_clipping": clipping},
        parallel={"expert_parallel_size": expert_parallel_size},
    )
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "run"))
    first, start = weights_after(tmp_path / "run", 1), weights_after(parent, STEPS)
    assert any("bias_YE" in name for name in start), "there is state that a balancer would move"
    for name, value in start.items():
        if name.startswith("encoder.") and "_counts" not in name:
            assert torch.equal(first[name], value.to(first[name].dtype)), name
    for step in range(2, FROZEN + 1):
        frozen = weights_after(tmp_path / "run", step)
        assert [name for name, value in frozen.items() if still(name) and not torch.equal(value, first[name])] == []
        moved = [name for name, value in frozen.items() if not still(name) and not torch.equal(value, first[name])]
        assert len(moved) > 20
    last = weights_after(tmp_path / "run", STEPS)
    same = [name for name in first if still(name) and last[name].ndim > 1 and torch.equal(last[name], first[name])]
    # An expert without tokens has no gradient, but decays.
    assert same == []


def test_the_first_step_after_freezing_is_adams_first(
    make_child: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    """Adam's first step is ``rate * gradient / (|gradient| + eps)``: with a count of its own it is at most the rate,
    whatever the betas, and where moments of the frozen time remained it would be far off."""
    config = make_child(
        training={"weight_decay": 0.0, "betas": [0.9, 0.999]}, freeze={"encoder": {"until": 0.5, "warmup_steps": 4}}
    )
    run_on_ranks(driver.train, 1, config, str(tmp_path / "run"))
    before, after = weights_after(tmp_path / "run", FROZEN), weights_after(tmp_path / "run", FROZEN + 1)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if line["kind"] == "train"]
    change = (
        after["encoder.blocks.0.attention.output.weight"] - before["encoder.blocks.0.attention.output.weight"]
    ).abs()
    assert 0.9 * rates[FROZEN] / 4 < float(change.median()) and float(change.max()) < 1.001 * rates[FROZEN] / 4


def test_frozen_for_ever_and_never_frozen(
    make_child: MakeExperiment, parent: Path, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_on_ranks(driver.train, 1, make_child(freeze={"encoder": {"until": 1.0}}), str(tmp_path / "ever"))
    start = weights_after(parent, STEPS)
    last = weights_after(tmp_path / "ever", STEPS)
    assert all(torch.equal(last[name], start[name]) for name in last if name.startswith("encoder.blocks"))
    run_on_ranks(driver.train, 1, make_child(freeze={}), str(tmp_path / "never"))
    first = weights_after(tmp_path / "never", 1)
    assert not torch.equal(
        first["encoder.blocks.0.attention.output.weight"], last["encoder.blocks.0.attention.output.weight"]
    )


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("number", [2, FROZEN + 1, FROZEN + 3])
def test_killed_it_goes_on_bit_for_bit_also_across_the_unfreezing(
    number: int,
    ranks: int,
    make_child: MakeExperiment,
    run_on_ranks: Run,
    run_until_killed: Callable[..., None],
    tmp_path: Path,
) -> None:
    config = make_child(training={"micro_batch_size": 4}, parallel={"expert_parallel_size": ranks})
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "whole"))
    run_until_killed(driver.train_and_die, ranks, config, str(tmp_path / "killed"), "before a step", number)
    run_on_ranks(driver.train, ranks, config, str(tmp_path / "killed"))
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert RunFolder(tmp_path / "killed").read_summary().ledger == RunFolder(tmp_path / "whole").read_summary().ledger


@pytest.mark.parametrize("architecture", ["encoder", "encoder_decoder"])
def test_ranks_and_micro_batches_change_losses_by_rounding_only(
    architecture: str, make_stage: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    losses = []
    objective = {"name": "masked"} if architecture == "encoder" else {"name": "prefix"}
    for number, (ranks, micro, expert_parallel_size) in enumerate(((1, 8, 1), (1, 2, 1), (2, 2, 2))):
        config = make_stage(
            architecture,
            objective=objective,
            routing={"router": {"name": "top_k"}, "balance": "none"},
            training={"micro_batch_size": micro},
            parallel={"expert_parallel_size": expert_parallel_size},
        )
        run_on_ranks(driver.train, ranks, config, str(tmp_path / str(number)))
        lines = read_metrics(tmp_path / str(number))
        losses.append([line["cross_entropy"] for line in lines])
        flops = [line["flops"] for line in lines if line["kind"] == "train"]
        assert flops == [line["flops"] for line in read_metrics(tmp_path / "0") if line["kind"] == "train"]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=2e-5)


def test_tables_and_blocks_alone(make_child: MakeExperiment, parent: Path, run_on_ranks: Run, tmp_path: Path) -> None:
    start = weights_after(parent, STEPS)
    for take in ("tables", "blocks"):
        config = make_child(start={"encoder": {"run": str(parent), "take": take}}, freeze={"encoder": {"until": 1.0}})
        run_on_ranks(driver.train, 1, config, str(tmp_path / take))
        last = weights_after(tmp_path / take, STEPS)
        name = "encoder.blocks.0.attention.output.weight"
        assert torch.equal(last[name], start[name]) == (take == "blocks")
        pieces = RunFolder(parent).read_config().data.mix.vocab_size
        rows = torch.equal(last["embedding.weight"][:pieces], start["embedding.weight"][:pieces])
        assert rows == (take == "tables")


def test_an_equal_start_gives_all_tables_the_encoders(
    make_child: MakeExperiment, parent: Path, run_on_ranks: Run, tmp_path: Path
) -> None:
    config = make_child(model={"embeddings": "equal_start"}, training={"learning_rate": 1e-30, "weight_decay": 0.0})
    run_on_ranks(driver.train, 1, config, str(tmp_path / "run"))
    start, last = weights_after(parent, STEPS), weights_after(tmp_path / "run", STEPS)
    pieces = RunFolder(parent).read_config().data.mix.vocab_size
    for table in ("embedding", "decoder_embedding", "output_embedding"):
        assert torch.equal(last[f"{table}.weight"][:pieces], start["embedding.weight"][:pieces]), table


def test_decoders_that_start_from_the_encoders_layers(
    make_child: MakeExperiment, parent: Path, run_on_ranks: Run, tmp_path: Path
) -> None:
    start = weights_after(parent, STEPS)
    quiet = {"learning_rate": 1e-30, "weight_decay": 0.0}
    run_on_ranks(driver.train, 1, make_child(start={"decoder": "copy"}, training=quiet), str(tmp_path / "copy"))
    last = weights_after(tmp_path / "copy", STEPS)
    for name, value in last.items():
        if name.startswith("decoder.blocks") and "cross_attention" not in name and not name.endswith("running"):
            assert torch.equal(value, start[name.replace("decoder.", "encoder.")]), name
    model = {"decoder": {"num_layers": 1}}
    config = make_child(start={"decoder": "interleaved"}, model=model, training=quiet)
    run_on_ranks(driver.train, 1, config, str(tmp_path / "interleaved"))
    last = weights_after(tmp_path / "interleaved", STEPS)
    width = last["embedding.weight"].shape[1]
    projected = start["encoder.blocks.1.attention.query_key_value.weight"]
    assert torch.equal(
        last["decoder.blocks.0.attention.output.weight"], start["encoder.blocks.0.attention.output.weight"]
    )
    assert torch.equal(last["decoder.blocks.0.cross_attention.query.weight"], projected[:width])
    assert torch.equal(last["decoder.blocks.0.cross_attention.key_value.weight"], projected[width:])
    experts = "blocks.{}.moe.deepspeed_moe.experts.deepspeed_experts.3.down"
    assert torch.equal(last[f"decoder.{experts.format(0)}"], start[f"encoder.{experts.format(1)}"])


def test_an_encoder_can_start_from_that_of_an_encoder_decoder(
    make_stage: MakeExperiment, make_child: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    run_on_ranks(driver.train, 1, make_child(), str(tmp_path / "child"))
    quiet = {"learning_rate": 1e-30, "weight_decay": 0.0}
    config = make_stage("encoder", start={"encoder": {"run": str(tmp_path / "child")}}, training=quiet)
    run_on_ranks(driver.train, 1, config, str(tmp_path / "again"))
    child, again = weights_after(tmp_path / "child", STEPS), weights_after(tmp_path / "again", STEPS)
    name = "encoder.blocks.1.attention.query_key_value.weight"
    assert torch.equal(again[name], child[name])
    start, ledger = RunFolder(tmp_path / "again").read_start(), RunFolder(tmp_path / "again").read_summary().ledger
    of_child = RunFolder(tmp_path / "child").read_summary().ledger
    assert start is not None and start.step == STEPS and ledger is not None and of_child is not None
    assert ledger["inherited_flops"] == of_child["flops"] + of_child["inherited_flops"] > of_child["flops"]


def change_config(run_dir: Path, **parts: Any) -> None:
    folder = RunFolder(run_dir)
    folder.write_config_tree({**folder.read_config_tree(), **parts})


@pytest.mark.parametrize(
    ("start", "model", "message"),
    [
        ({"encoder": {"run": "nowhere"}}, {}, "start.encoder.run is nowhere, but nowhere is no folder of a run"),
        ({}, {"hidden_size": 24}, "start.encoder.run has model.hidden_size 16, and this model 24; make them alike"),
        ({}, {"encoder": {"num_layers": 3}}, "does not fit this model's: encoder.blocks.2."),
        ({}, {"encoder": {"num_layers": 1}}, "does not fit this model's, which has no encoder.blocks.1."),
        (
            {},
            {"encoder": {"dense_baseline": True}},
            "does not fit this model's: encoder.blocks.0.dense.gate.weight is missing",
        ),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_the_first_step(
    start: dict[str, Any],
    model: dict[str, Any],
    message: str,
    make_child: MakeExperiment,
    run_on_ranks: Run,
    tmp_path: Path,
) -> None:
    with pytest.raises(Exception, match="ConfigError") as caught:
        run_on_ranks(driver.train, 1, make_child(start=start, model=model), str(tmp_path / "run"))
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() or not read_metrics(tmp_path / "run")


def test_a_child_whose_parent_is_another_one_now_is_stale(
    make_stage: MakeExperiment, run_on_ranks: Run, run_until_killed: Callable[..., None], tmp_path: Path
) -> None:
    run_on_ranks(driver.train, 1, make_stage("encoder"), str(tmp_path / "mlm"))
    start = {"encoder": {"run": str(tmp_path / "mlm")}}
    child = make_stage("encoder_decoder", start=start)
    run_until_killed(driver.train_and_die, 1, child, str(tmp_path / "child"), "before a step", 4)
    (tmp_path / "mlm").rename(tmp_path / "former")
    run_on_ranks(driver.train, 1, make_stage("encoder") | {"seed": 9}, str(tmp_path / "mlm"))
    with pytest.raises(Exception, match="which has been trained anew since, with other weights: it is stale"):
        run_on_ranks(driver.train, 1, child, str(tmp_path / "child"))
    # Trained once more with its own seed, it is the same one.
    (tmp_path / "mlm").rename(tmp_path / "other")
    run_on_ranks(driver.train, 1, make_stage("encoder"), str(tmp_path / "mlm"))
    run_on_ranks(driver.train, 1, child, str(tmp_path / "child"))
    assert RunFolder(tmp_path / "child").is_finished


def test_a_parent_that_is_not_finished_is_refused(
    make_child: MakeExperiment, parent: Path, run_on_ranks: Run, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for file in parent.iterdir():
        if file.is_file():
            (half / file.name).write_bytes(file.read_bytes())
    status = json.loads((half / "status.json").read_text())
    (half / "status.json").write_text(json.dumps(status | {"state": "stopped", "step": 2}))
    with pytest.raises(Exception, match="is not finished") as caught:
        run_on_ranks(driver.train, 1, make_child(start={"encoder": {"run": str(half)}}), str(tmp_path / "run"))
    assert "(stopped, step 2 of 6); train it to its end first" in str(caught.value)


def test_the_error_is_a_users(make_child: MakeExperiment, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no folder of a run"):
        driver.train(make_child(start={"encoder": {"run": "nowhere"}}), str(tmp_path / "run"))


def test_weights_read_by_the_tests_are_those_that_the_product_reads(parent: Path) -> None:
    theirs, ours = read_weights(parent), weights_after(parent, STEPS)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
