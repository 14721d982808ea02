"""How ranks share a step, against the places that the training loop gives out."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_testbed.launcher.config.experiment import ExperimentConfig, load_experiment
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.sharing import accumulation_steps, check_layout, micro_batch_size, shared_among


def load(experiment: Path, batch: int, micro: int, *overrides: str) -> ExperimentConfig:
    return load_experiment(
        experiment, [f"training.global_batch_size={batch}", f"training.micro_batch_size={micro}", *overrides]
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 8, 24])
@pytest.mark.parametrize("micro", [1, 2, 3, 4, 8, 24])
def test_every_sequence_is_computed_once_in_as_few_steps_as_memory_allows(
    experiment: Path, micro: int, num_ranks: int
) -> None:
    batch = 24
    config = load(experiment, batch, micro)
    # No more than micro sequences at once on a rank, the same number each time, and none left over.
    sizes = [size for size in range(1, micro + 1) if batch % (size * num_ranks) == 0]
    if micro * num_ranks <= batch and micro not in sizes:
        with pytest.raises(ConfigError, match=f"make it a multiple of {micro * num_ranks}$"):
            micro_batch_size(config, num_ranks)
        return
    size, accumulation = micro_batch_size(config, num_ranks), accumulation_steps(config, num_ranks)
    assert size == max(sizes) == shared_among(config, num_ranks).training.micro_batch_size
    sequences = [
        (step * num_ranks + rank) * size + place
        for step in range(accumulation)
        for rank in range(num_ranks)
        for place in range(size)
    ]
    assert sequences == list(range(batch))


@pytest.mark.parametrize(
    ("batch", "micro", "num_ranks", "message"),
    [
        (8, 4, 3, r"global_batch_size is 8, which 3 ranks cannot share evenly; make it a multiple of 3, or start"),
        (8, 8, 16, r"global_batch_size is 8, which 16 ranks cannot share evenly; make it a multiple of 16, or start"),
        (12, 4, 2, r"global_batch_size is 12, which 2 ranks with training.micro_batch_size 4 .*; make it a multiple"),
    ],
)
def test_ranks_that_cannot_share_the_batch(
    experiment: Path, batch: int, micro: int, num_ranks: int, message: str
) -> None:
    for function in (micro_batch_size, accumulation_steps, check_layout):
        with pytest.raises(ConfigError, match=message):
            function(load(experiment, batch, micro), num_ranks)


@pytest.mark.parametrize(
    ("overrides", "reader"),
    [
        (["model.moe.dispatch=capacity"], r"the capacity of model\.moe\.dispatch"),
        (["routing.router={name: expert_choice, pool: micro_batch}"], r"routing\.router\.pool"),
        (["routing.balance.load_balancing_loss.scope=micro_batch"], r"routing\.balance\.load_balancing_loss\.scope"),
    ],
)
def test_a_share_below_a_micro_batch_is_refused_where_it_would_change_the_routing(
    experiment: Path, overrides: list[str], reader: str
) -> None:
    config = load(experiment, 8, 4, *overrides)
    assert [micro_batch_size(config, num_ranks) for num_ranks in (1, 2)] == [4, 4]
    with pytest.raises(ConfigError, match=rf"each of 4 ranks has 2 sequences .*, and {reader} depends on .* to 2"):
        micro_batch_size(config, 4)
    # As the message says.
    assert micro_batch_size(load(experiment, 8, 2, *overrides), 4) == 2
    # Without experts there is nothing to route.
    assert micro_batch_size(load(experiment, 8, 4, *overrides, "model.dense_baseline=true"), 4) == 2


def test_what_reads_a_micro_batch_may_be_the_encoder_alone(experiment: Path) -> None:
    pool = "routing.encoder={router: {name: expert_choice, pool: micro_batch}}"
    both = ["model.architecture=encoder_decoder", "objective={name: denoising, rate: 0.3}", pool]
    with pytest.raises(ConfigError, match=r"and routing\.encoder\.router\.pool depends on"):
        micro_batch_size(load(experiment, 8, 4, *both), 4)
    assert micro_batch_size(load(experiment, 8, 4, *both, "model.encoder.dense_baseline=true"), 4) == 2


def test_experts_that_ranks_cannot_share(experiment: Path) -> None:
    config = load(experiment, 12, 1, "parallel.expert_parallel_size=4")
    check_layout(config, 4)
    check_layout(config, 12)
    with pytest.raises(
        ConfigError,
        match=r"expert_parallel_size is 4, which does not divide .* ranks, 6; start a multiple of 4",
    ):
        check_layout(config, 6)
