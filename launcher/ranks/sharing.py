"""How ranks share the global batch and the experts. It is computed without ranks or DeepSpeed, and so ahead of them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.routing.scopes import Scope


def micro_batch_size(config: ExperimentConfig, num_ranks: int) -> int:
    """Returns the number of sequences that a rank computes at once: ``training.micro_batch_size``, or its share of the
    global batch if that is less.

    Raises:
        ConfigError: the ranks cannot share the global batch evenly, or less than ``training.micro_batch_size`` would
            change what the routing is balanced over.
    """
    training = config.training
    batch, micro = training.global_batch_size, training.micro_batch_size
    if batch >= micro * num_ranks:
        if batch % (micro * num_ranks):
            raise ConfigError(
                f"training.global_batch_size is {batch}, which {num_ranks} ranks with training.micro_batch_size "
                f"{micro} cannot share evenly; make it a multiple of {micro * num_ranks}"
            )
        return micro
    if batch % num_ranks:
        raise ConfigError(
            f"training.global_batch_size is {batch}, which {num_ranks} ranks cannot share evenly; make it a multiple "
            f"of {num_ranks}, or start another number of ranks"
        )
    share = batch // num_ranks
    if reader := _what_reads_micro_batches(config):
        raise ConfigError(
            f"training.micro_batch_size is {micro}, but each of {num_ranks} ranks has {share} sequences of a step, and "
            f"{reader} depends on how many are computed at once; set training.micro_batch_size to {share} or less, in "
            "the runs that this one is compared with as well"
        )
    return share


def accumulation_steps(config: ExperimentConfig, num_ranks: int) -> int:
    """Returns the micro-batches per rank and optimizer step. Raises ConfigError as `micro_batch_size`."""
    return config.training.global_batch_size // (micro_batch_size(config, num_ranks) * num_ranks)


def shared_among(config: ExperimentConfig, num_ranks: int) -> ExperimentConfig:
    """Returns the experiment with the micro-batch size that so many ranks use, in training and evaluation.

    Raises:
        ConfigError: the ranks cannot share the batch or the experts evenly.
    """
    check_layout(config, num_ranks)
    size = micro_batch_size(config, num_ranks)
    return config.model_copy(update={"training": config.training.model_copy(update={"micro_batch_size": size})})


def check_layout(config: ExperimentConfig, num_ranks: int) -> None:
    """Raises ConfigError if the ranks cannot share the batch or the experts evenly."""
    micro_batch_size(config, num_ranks)
    size = config.parallel.expert_parallel_size
    if num_ranks % size:
        raise ConfigError(
            f"parallel.expert_parallel_size is {size}, which does not divide the number of ranks, {num_ranks}; start a "
            f"multiple of {size} processes, or lower it"
        )


def check_placement(config: ExperimentConfig, node_of_rank: Sequence[str]) -> None:
    """Raises ConfigError if an expert-parallel group lies on several nodes and the experiment does not say that it may.

    Args:
        node_of_rank: name of each rank's node.
    """
    size = config.parallel.expert_parallel_size
    if config.parallel.expert_parallel_across_nodes:
        return
    for first in range(0, len(node_of_rank), size):
        names = list(dict.fromkeys(node_of_rank[first : first + size]))
        if len(names) > 1:
            raise ConfigError(
                f"parallel.expert_parallel_size is {size}, so that the ranks {first} to {first + size - 1} share their "
                f"experts across the nodes {', '.join(names)}, by their slow connection; choose a size that divides "
                "the ranks of a node, or set parallel.expert_parallel_across_nodes to true"
            )


def _what_reads_micro_batches(config: ExperimentConfig) -> str | None:
    for name in config.model.stacks:
        if config.model.of_stack(name).num_moe_layers and (reader := _reader(config, name)):
            return reader
    return None


def _reader(config: ExperimentConfig, name: str) -> str | None:
    routing = config.routing.of_stack(name)
    key = "routing" if routing is config.routing else f"routing.{name}"
    if config.model.moe.dispatch == "capacity":
        return "the capacity of model.moe.dispatch"
    if getattr(routing.router, "pool", None) is Scope.MICRO_BATCH:
        return f"{key}.router.pool"
    labels = [
        label for label, options in routing.balance.items() if getattr(options, "scope", None) is Scope.MICRO_BATCH
    ]
    return f"{key}.balance.{labels[0]}.scope" if labels else None
