"""A plan in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.layout import Layout
from moe_testbed.launcher.cluster.plan.compute import planned_compute
from moe_testbed.launcher.cluster.plan.plan import Plan, make_plan
from moe_testbed.launcher.cluster.plan.remedies import remedies
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import FAILED
from moe_testbed.launcher.ranks.sharing import accumulation_steps, micro_batch_size
from moe_testbed.launcher.run.columns import aligned

_SHOWN = 4  # ranks, or lines, of many; then the last


def print_plan(config: ExperimentConfig, cluster: ClusterConfig) -> int:
    """Prints the plan of a training.

    Returns:
        Exit status: 0 if it fits, 1 if it does not.

    Raises:
        ConfigError: see `make_plan`.
    """
    plan = make_plan(config, cluster)
    print(plan_text(plan))
    return 0 if plan.fits else FAILED


def plan_text(plan: Plan) -> str:
    """Returns layout, experts, arithmetic, memory, traffic and verdict, for a terminal."""
    parts = [_layout(plan)]
    if plan.config.model.num_moe_layers:
        parts.append(_experts(plan))
    return "\n\n".join([*parts, _compute(plan), _memory(plan), _traffic(plan), _verdict(plan)])


def _layout(plan: Plan) -> str:
    layout, cluster, config = plan.layout, plan.cluster, plan.config
    ranks = layout.world_size
    gpus = _count(layout.ranks_per_node, "GPU")
    if cluster.accelerator == "cpu":
        gpus = _count(layout.ranks_per_node, "process", "es")
    micro, accumulation = micro_batch_size(config, ranks), accumulation_steps(config, ranks)
    rows = [("data-parallel", str(ranks), _extent(layout, [range(ranks)]))]
    if config.model.num_moe_layers:
        rows += [
            ("expert-parallel", str(layout.expert_parallel_size), _extent(layout, layout.expert_parallel_groups)),
            (
                "expert-data-parallel",
                str(layout.expert_data_parallel_size),
                _extent(layout, layout.expert_data_parallel_groups),
            ),
        ]
    return "\n".join(
        [
            f"{config.name} on {cluster.name}: {_count(ranks, 'rank')}, {_count(layout.nodes, 'node')} of {gpus}",
            "",
            *_table(("Groups", "ranks", "where"), rows),
            f"A step of {config.training.global_batch_size} sequences: {_count(ranks, 'rank')} x "
            f"{_count(accumulation, 'micro-batch', 'es')} x {_count(micro, 'sequence')} of "
            f"{config.data.sequence_length} tokens.",
        ]
    )


def _extent(layout: Layout, groups: Sequence[range]) -> str:
    most = max(len(layout.nodes_of(group)) for group in groups)
    number = "one group" if len(groups) == 1 else f"{len(groups)} groups"
    each = "" if len(groups) == 1 else " each"
    if most == 1:
        return f"{number},{each} within a node"
    return f"{number},{each} across {most} nodes"


def _experts(plan: Plan) -> str:
    layout, experts = plan.layout, plan.config.model.moe.num_ffn_experts
    held = experts // layout.expert_parallel_size
    rows = []
    for place, ranks in enumerate(layout.expert_data_parallel_groups):
        first = place * held
        numbers = str(first) if held == 1 else f"{first} to {first + held - 1}"
        rows.append((numbers, _some([str(rank) for rank in ranks])))
    if len(rows) > 2 * _SHOWN:
        rows = [*rows[:_SHOWN], ("...", "..."), rows[-1]]
    return "\n".join(_table(("Experts", "on ranks"), rows))


def _compute(plan: Plan) -> str:
    compute = planned_compute(plan.config)
    rows = []
    for phase in compute.phases:
        frozen = " and ".join(name for name in plan.config.model.stacks if name in phase.frozen)
        label = f"{phase.steps:,} with the {frozen} frozen" if frozen else f"{phase.steps:,}"
        rows.append((label, *map(_tera, phase.flops.values()), _tera(phase.total)))
    heads = ("Steps, and 10^12 FLOPs of one", *compute.phases[0].flops, "sum")
    return "\n".join(
        [
            *_table(heads, rows),
            f"All steps take {_tera(compute.total)}; {compute.size.parameters:,} parameters, of which a token uses "
            f"{compute.size.active_parameters:,}.",
        ]
    )


def _some(names: list[str]) -> str:
    return ", ".join(names if len(names) <= 2 * _SHOWN else [*names[:_SHOWN], "...", names[-1]])


def _memory(plan: Plan) -> str:
    memory, training = plan.memory, plan.config.training
    shared, experts = (sum(w.size for w in plan.weights if w.expert == expert) for expert in (False, True))
    checkpointing = training.activation_checkpointing
    notes = {
        "parameters": f"{shared:,} shared, {experts:,} of its experts, in {training.precision}",
        "gradients": f"in float32, ZeRO {training.zero_stage}",
        "optimizer state": "not divided" if training.zero_stage == 0 else "divided over the ranks that share it",
        "activations": f"with{'' if checkpointing else 'out'} activation checkpointing; "
        f"with{'out' if checkpointing else ''} it {_gb(memory.activations_otherwise)}",
    }
    rows = [(name, _gb(value), notes.get(name, "")) for name, value in memory.parts.items() if value]
    rows.append(("sum", _gb(memory.total), f"of {plan.cluster.gpu_memory_gb:.2f}"))
    holder = "GPU" if plan.cluster.accelerator == "cuda" else "process"
    return "\n".join(_table((f"Memory of a {holder}", "GB", ""), rows))


def _traffic(plan: Plan) -> str:
    if not plan.traffic:
        return "Nothing is sent: there is one rank."
    link = plan.cluster.interconnect
    rows: list[tuple[str, ...]] = [
        (
            traffic.what,
            traffic.collective,
            str(traffic.ranks),
            _mb(traffic.within),
            _mb(traffic.between),
            f"{traffic.seconds(link):.4f}",
        )
        for traffic in plan.traffic
    ]
    within, between = (sum(getattr(traffic, name) for traffic in plan.traffic) for name in ("within", "between"))
    rows.append(("sum", "", "", _mb(within), _mb(between), f"{plan.seconds:.4f}"))
    heads = ("Sent by a rank in a step", "by", "among", "MB within its node", "MB to other nodes", "seconds")
    return "\n".join(
        [
            *_table(heads, rows),
            f"Seconds at {link.within_node_gb_per_s:g} GB/s within a node and {link.between_nodes_gb_per_s:g} GB/s "
            "of a node to others; experts are taken to be used alike.",
        ]
    )


def _verdict(plan: Plan) -> str:
    if plan.fits:
        return f"It fits, with {_gb(plan.spare_bytes)} GB to spare."
    name, value = max(plan.memory.parts.items(), key=lambda item: item[1])
    lines = [f"It does not fit: {_gb(-plan.spare_bytes)} GB are missing. Most is taken by {name}, {_gb(value)} GB."]
    found = remedies(plan)
    if found:
        lines.append(f"It would fit with {', or '.join(found)}.")
    else:
        lines.append(
            "No activation checkpointing, ZeRO stage, micro-batch or expert-parallel group within a node makes it fit; "
            "it needs GPUs with more memory, a shorter data.sequence_length or a smaller model."
        )
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of numbers to the right."""
    words = [column for column in range(len(heads)) if not all(_is_number(row[column]) for row in rows)]
    return aligned([heads, *rows], left=words)


def _is_number(text: str) -> bool:
    return not text.strip("0123456789.,")


def _count(number: int, word: str, plural: str = "s") -> str:
    return f"{number} {word}{'' if number == 1 else plural}"


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}"


def _tera(flops: int) -> str:
    return f"{flops / 1e12:,.4g}" if flops < 1e15 else f"{flops / 1e12:,.0f}"


def _mb(value: float) -> str:
    return f"{value / 1e6:,.1f}"
