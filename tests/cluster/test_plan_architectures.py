"""The plan of encoders and encoder-decoders: sizes in closed form, the ledgers of real trainings, and the command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.cluster.config import load_cluster
from moe_testbed.launcher.cluster.plan.compute import planned_compute
from moe_testbed.launcher.cluster.plan.plan import Plan, make_plan
from moe_testbed.launcher.cluster.plan.weights import rank_weights
from moe_testbed.launcher.config.experiment import ExperimentConfig, load_experiment
from moe_testbed.launcher.run.folder import RunFolder
from tests.train import driver

SEQ2SEQ, H100, LAPTOP = (
    f"configs/{name}.yaml" for name in ("experiments/seq2seq", "clusters/slurm_h100", "clusters/laptop")
)


def seq2seq(*overrides: str) -> ExperimentConfig:
    return load_experiment(SEQ2SEQ, overrides)


@pytest.mark.parametrize(
    ("overrides", "tables"),
    [
        (["model.architecture=encoder", "objective=masked"], 1),
        (["model.architecture=encoder", "objective=masked", "model.embeddings=separate"], 2),
        ([], 1),
        (["model.embeddings=equal_start", "model.decoder.num_layers=2"], 3),
        (["model.dense_baseline=false", "model.moe.every=2"], 1),
        (["model.encoder.dense_baseline=false", "objective.mark=sentinel", "objective.target=spans"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize("size", [1, 2])
def test_weights_are_those_of_every_part(overrides: list[str], tables: int, size: int) -> None:
    config = seq2seq(f"parallel.expert_parallel_size={size}", *overrides)
    model, width = config.model, config.model.hidden_size
    pieces, length = config.data.mix.vocab_size, config.data.sequence_length
    # Mask and start; for each gap, of which a text has on average one for every three missing tokens, twice as many.
    sentinels = 0
    if "objective.mark=sentinel" in overrides:
        longest = round(2 * 0.15 * length) - int(0.15 * length / 2)
        sentinels = -(-2 * longest // 3) + 1
    rows = -(-(pieces + sentinels + 2) // 8) * 8
    expected = tables * rows * width
    for name in model.stacks:
        stack = model.of_stack(name)
        attentions = 2 if (name, model.architecture) == ("decoder", "encoder_decoder") else 1
        expected += width
        for layer in range(stack.num_layers):
            expected += attentions * (4 * width**2 + width) + width
            if stack.is_moe_layer(layer):
                expert = 3 * width * stack.moe.expert_hidden_size
                expected += stack.moe.num_experts * (expert + width)
            else:
                expected += 3 * width * stack.dense_size(layer)
    weights = rank_weights(config)
    experts = sum(weight.size for weight in weights if weight.expert)
    assert sum(weight.size for weight in weights) + (size - 1) * experts == expected
    assert planned_compute(config).size.parameters == expected


@pytest.mark.parametrize("dense", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize(
    ("architecture", "objective", "freeze", "frozen"),
    [
        ("causal", {"name": "next_token"}, {}, [set()]),
        ("encoder", {"name": "masked"}, {}, [set()]),
        ("encoder_decoder", {"name": "denoising", "rate": 0.3}, {}, [set()]),
        ("encoder_decoder", {"name": "denoising", "rate": 0.3}, {"encoder": {"until": 0.5}}, [{"encoder"}, set()]),
        ("encoder_decoder", {"name": "denoising", "rate": 0.3}, {"encoder": {"until": 1.0}}, [{"encoder"}]),
    ],
    ids=lambda value: str(value),
)
def test_the_arithmetic_is_what_a_training_s_ledger_says(
    architecture: str,
    objective: dict[str, Any],
    freeze: dict[str, Any],
    frozen: list[set[str]],
    dense: bool,
    make_experiment: Callable[..., dict[str, Any]],
    run_on_ranks: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    model = {"architecture": architecture, "dense_baseline": dense}
    options = make_experiment(model=model, objective=objective, freeze=freeze)
    run_on_ranks(driver.train, 1, options, str(tmp_path / "run"))
    summary = RunFolder(tmp_path / "run").read_summary()
    planned = planned_compute(ExperimentConfig.model_validate(options))
    assert summary.ledger is not None
    assert planned.total == summary.ledger["flops"]
    assert [set(phase.frozen) for phase in planned.phases] == frozen
    by_part = {
        part: sum(phase.steps * phase.flops[part] for phase in planned.phases) for part in planned.phases[0].flops
    }
    assert by_part == summary.ledger["flops_by_part"]
    assert (planned.size.parameters, planned.size.active_parameters) == (summary.parameters, summary.active_parameters)


def test_the_peak_is_that_of_the_steps_after_unfreezing() -> None:
    experiment = ["model.dense_baseline=false", "parallel.expert_parallel_size=4"]
    where = load_cluster(H100, ["nodes=1", "gpus_per_node=4"])
    never = make_plan(seq2seq(*experiment), where)
    half = make_plan(seq2seq(*experiment, "freeze.encoder.until=0.5"), where)
    ever = make_plan(seq2seq(*experiment, "freeze.encoder.until=1"), where)
    assert half.memory.activations == never.memory.activations > ever.memory.activations

    def sent(plan: Plan, stack: str) -> int:
        return next(traffic.handed for traffic in plan.traffic if traffic.what == f"tokens to experts of the {stack}")

    for stack in ("encoder", "decoder"):
        assert sent(half, stack) == sent(never, stack)
    # Hidden states go there and back forward, and their gradients backward; the weights forward, and their gradients.
    layers, assignments, row, counts = 4, 2 * 8 * 119, 2 * 4 * 64, 8 * 32
    assert sent(never, "encoder") == layers * (assignments * (2 * row + 2 * 4) + counts)
    assert sent(ever, "encoder") == layers * (assignments * (row + 4) + counts)
    assert sent(never, "decoder") == layers * (2 * 8 * 128 * (2 * row + 2 * 4) + counts)
    assert sent(ever, "decoder") == sent(never, "decoder")


def test_the_command_tells_of_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", SEQ2SEQ, "--cluster", LAPTOP, "model.dense_baseline=false", "freeze.encoder.until=0.25"]
    assert main([*arguments, "parallel.expert_parallel_size=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (heads,) = (line.split() for line in lines if line.startswith("Steps, and"))
    assert heads[-4:] == ["encoder", "decoder", "output", "sum"]
    assert any(line.startswith("375 with the encoder frozen ") for line in lines)
    assert any(line.startswith("1,125 ") for line in lines)
    for stack in ("encoder", "decoder"):
        assert any(line.startswith(f"tokens to experts of the {stack} ") for line in lines)
