"""What is said of a run before it begins and after it has ended."""

from __future__ import annotations

from dataclasses import asdict

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import ModelSize
from moe_testbed.launcher.export.conditions import refusal
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run import environment
from moe_testbed.launcher.run.records import LedgerRecord, Summary
from moe_testbed.launcher.train.stages.parent import Parent


def announcement(config: ExperimentConfig, size: ModelSize, first_step: int, parent: Parent | None = None) -> str:
    """Returns what is trained, and what must be known before it is.

    Args:
        parent: what it starts from now; None if it starts from its seed, or continues.
    """
    begin = f"continuing after step {first_step}" if first_step else "starting"
    text = (
        f"{config.name}, seed {config.seed}: router {config.routing.router.name}, {size.parameters:,} parameters, "
        f"{size.active_parameters:,} active, {size.flops_per_token:,} FLOPs per token, {begin}"
    )
    if not config.causal:
        text += (
            "\nthis routing is not causal: a token's route depends on later tokens, so that its losses cannot be "
            "compared with those of causal ones; the report marks it"
        )
    if parent and parent.ledger is None:
        text += (
            f"\n{parent.path} does not tell what its training has taken: the ledger of this run knows its own FLOPs "
            "alone"
        )
    # Whoever trains one of these is likely to want to use it.
    if config.model.architecture != "causal" and (reason := refusal(config)):
        text += f"\n{reason}"
    return text


def summary(config: ExperimentConfig, size: ModelSize, ledger: LedgerRecord, ranks: Ranks, seconds: float) -> Summary:
    """Returns what is told of a training of so many seconds."""
    tokens = config.training.steps * config.training.global_batch_size * config.data.sequence_length
    return Summary(
        **asdict(size),
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        learned=config.routing.router.learned and not config.model.dense_baseline,
        causal=config.causal,
        ranks=ranks.size,
        peak_memory_bytes=environment.peak_memory_bytes(),
        versions=environment.versions(),
        commit=environment.commit(),
        hardware=environment.hardware(ranks.device),
        command=environment.command(),
        ledger=asdict(ledger),
    )
