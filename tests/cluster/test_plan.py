"""The plan of trainings that are not run: closed forms and loops over ranks as oracles, and the command."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

import pytest

from moe_testbed.launcher.cli.main import main
from moe_testbed.launcher.cluster.config import ClusterConfig, load_cluster
from moe_testbed.launcher.cluster.layout import Layout
from moe_testbed.launcher.cluster.plan.activations import planned_activations
from moe_testbed.launcher.cluster.plan.memory import Group, optimizer_groups
from moe_testbed.launcher.cluster.plan.plan import Plan, make_plan
from moe_testbed.launcher.cluster.plan.remedies import remedies
from moe_testbed.launcher.cluster.plan.traffic import Traffic, planned_traffic
from moe_testbed.launcher.cluster.plan.weights import Weight, rank_weights
from moe_testbed.launcher.config.experiment import ExperimentConfig, load_experiment
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.model.output_layer import tokens_per_block
from tests.model.closed_forms import model_size

LARGE, SLURM = "configs/experiments/large.yaml", "configs/clusters/slurm_h100.yaml"


def large(*overrides: str) -> ExperimentConfig:
    return load_experiment(LARGE, overrides)


def cluster(*overrides: str) -> ClusterConfig:
    return load_cluster(SLURM, overrides)


def numbers(weights: Sequence[Weight]) -> int:
    return sum(weight.size for weight in weights)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.dense_baseline=true"],
        ["model.moe.every=2", "model.moe.num_shared_experts=2", "model.moe.split=3"],
        ["model.moe.num_zero_experts=1", "model.moe.num_constant_experts=2"],
        ["routing.router.name=hash", "routing.balance=none"],
        ["routing.depth=global", "routing.router.name=cosine"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
@pytest.mark.parametrize("size", [1, 8])
def test_weights_are_those_of_the_model_s_own_count(overrides: list[str], size: int) -> None:
    config = large(f"parallel.expert_parallel_size={size}", *overrides)
    weights = rank_weights(config)
    router = numbers([weight for weight in weights if ".routing." in weight.name])
    expected = model_size(config.model, config.data.mix.vocab_size, config.data.sequence_length, router)["parameters"]
    experts = numbers([weight for weight in weights if weight.expert])
    assert numbers(weights) - experts + experts * size == expected


def test_a_frozen_router_has_no_gradient() -> None:
    config = large("routing.router.name=frozen")
    frozen = [weight for weight in rank_weights(config) if not weight.trainable]
    assert {weight.name.rpartition(".routing.")[2] for weight in frozen} == {"router.scorer.weight"}
    trainable, everything = (
        make_plan(large(f"routing.router.name={name}"), cluster()).memory for name in ("frozen", "top_k")
    )
    assert trainable.parameters == everything.parameters
    assert everything.gradients - trainable.gradients == 4 * numbers(frozen)


def test_a_group_is_divided_like_its_numbers_one_by_one() -> None:
    sizes = (7, 1, 30, 2, 5)
    for ranks in (1, 2, 3, 8):
        group = Group(sizes, False, ranks)
        part = group.partition_size
        assert part * ranks >= sum(sizes) > part * ranks - 2 * ranks and part % 2 == 0
        owner = [number // part for number in range(sum(sizes))]
        touched = [0] * ranks
        start = 0
        for size in sizes:
            for rank in set(owner[start : start + size]):
                touched[rank] += size
            start += size
        assert group.touched() == touched


def test_experts_are_divided_in_groups_of_limited_size() -> None:
    weights = [Weight("a", (90_000_000, 1), expert=True)] * 3 + [Weight("b", (8,)), Weight("c", (8, 8))]
    groups = optimizer_groups(weights, Layout(1, 4, 2))
    assert [(group.sizes, group.ranks) for group in groups] == [
        ((64,), 4),
        ((8,), 4),
        ((90_000_000,), 2),
        ((90_000_000,), 2),
        ((90_000_000,), 2),
    ]


def test_zero_divides_what_it_says() -> None:
    layouts = {stage: make_plan(large(f"training.zero_stage={stage}"), cluster()).memory for stage in (1, 2)}
    weights = rank_weights(large())
    experts = numbers([weight for weight in weights if weight.expert])
    shared = numbers(weights) - experts
    # Three float32 numbers each; 64 ranks share all but the experts, 8 hold the same experts.
    assert layouts[1].optimizer_state == pytest.approx(12 * (shared / 64 + experts / 8), rel=1e-6)
    # Gradients are kept in float32, with a few numbers to make parts even.
    assert layouts[1].gradients == pytest.approx(4 * numbers(weights), rel=1e-6)
    assert layouts[2].gradients == pytest.approx(4 * (shared / 64 + experts / 8), rel=1e-6)
    assert layouts[2].optimizer_state == layouts[1].optimizer_state
    float32 = large("training.zero_stage=0", "training.precision=float32", "training.gradient_clipping=0")
    assert make_plan(float32, cluster()).memory.optimizer_state == 8 * numbers(weights)
    assert make_plan(float32, cluster()).memory.reduction_buffer == 0


def test_the_optimizer_s_step_may_need_more_than_the_activations() -> None:
    dense = large(
        "model.dense_baseline=true",
        "training.micro_batch_size=1",
        "data.sequence_length=256",
        "parallel.expert_parallel_size=1",
    )
    memory = make_plan(dense, cluster("nodes=1", "gpus_per_node=1")).memory
    # The matrices fill a bucket by themselves, so that they are sent rounded and not laid end to end before.
    assert memory.copies == 4 * numbers(rank_weights(dense)) > memory.activations
    held = memory.parameters + memory.gradients + memory.optimizer_state + memory.reduction_buffer + memory.reserved
    assert memory.total == held + memory.copies
    alike = make_plan(large("training.micro_batch_size=4"), cluster()).memory
    assert alike.total == sum(alike.parts.values()) and alike.parts["copies, beyond activations"] == 0


def test_activation_checkpointing_keeps_inputs_and_one_block() -> None:
    activations = planned_activations(large(), 2, 2, "cuda")
    (stack,) = activations.stacks
    tokens, hidden_size, width, vocab_size = 2 * 4096, 1536, 2 * 1536, 32_000
    # Input, scores twice, and per choice its number, its weight and whether it arrived.
    assert set(stack.kept_of_blocks) == {tokens * (width + 8 * 128 + 8 * (8 + 4 + 1))}
    # A block of logits in bfloat16 and float32, with gradients; the weight once more, and its gradient in both.
    block = tokens_per_block(vocab_size, "cuda")
    assert block < tokens
    assert activations.loss_blocks == block * vocab_size * 2 * (2 + 4) + vocab_size * hidden_size * (2 + 4)
    # Without recomputation the loss comes when most is held; with it, a block's own backward pass needs most.
    assert activations.peak(False) == sum(stack.blocks) + activations.head + activations.loss_blocks
    one_block = stack.blocks[0] + stack.block_gradients
    assert activations.peak(True) == sum(stack.kept_of_blocks) + one_block > activations.held(True)
    # On a CPU the blocks are small.
    assert planned_activations(large(), 2, 2, "cpu").loss_blocks < activations.loss_blocks / 2
    # With many token ids and recomputation the loss needs most, too.
    many = planned_activations(large("data.mix.vocab_size=256000"), 2, 2, "cuda")
    assert many.peak(True) == many.held(True) + many.loss_blocks


def sent_by_loops(traffic: Traffic, layout: Layout, groups: list[range]) -> tuple[float, float]:
    """Within and between nodes, per rank of the node that sends most to others, message by message."""
    within: Counter[int] = Counter()
    between: Counter[int] = Counter()

    def send(source: int, target: int, size: float) -> None:
        here, there = layout.node_of(source), layout.node_of(target)
        (within if here == there else between)[here] += size  # type: ignore[assignment]

    for group in groups:
        ranks = list(group)
        for place, rank in enumerate(ranks):
            part = traffic.handed / len(ranks)
            if traffic.collective == "all-to-all":
                for other in ranks:
                    if other != rank:
                        send(rank, other, part)
            else:
                # A ring passes one part on in each of n - 1 rounds; to reduce and to gather takes two of them.
                for _ in range((len(ranks) - 1) * (2 if traffic.collective == "all-reduce" else 1)):
                    send(rank, ranks[(place + 1) % len(ranks)], part)
    node = max(range(layout.nodes), key=lambda node: between[node])
    return within[node] / layout.ranks_per_node, between[node] / layout.ranks_per_node


@pytest.mark.parametrize(
    ("nodes", "ranks_per_node", "size"), [(1, 8, 4), (2, 4, 1), (2, 4, 4), (2, 4, 8), (4, 2, 4), (3, 4, 6), (3, 2, 2)]
)
def test_links_carry_what_every_message_adds_up_to(nodes: int, ranks_per_node: int, size: int) -> None:
    config = large(
        f"parallel.expert_parallel_size={size}",
        "parallel.expert_parallel_across_nodes=true",
        "model.moe.num_experts=24",
        "training.global_batch_size=240",
        "training.micro_batch_size=1",
    )
    layout = Layout(nodes, ranks_per_node, size)
    found = planned_traffic(config, rank_weights(config), layout)
    everyone = [range(layout.world_size)]
    for traffic in found:
        groups = {
            "tokens to experts": layout.expert_parallel_groups,
            "gradients of experts": layout.expert_data_parallel_groups,
            "updated experts": layout.expert_data_parallel_groups,
        }.get(traffic.what, everyone)
        assert traffic.ranks == len(groups[0])
        assert (traffic.within, traffic.between) == pytest.approx(sent_by_loops(traffic, layout, groups))
    assert ("tokens to experts" in {t.what for t in found}) == (size > 1)
    assert ("gradients of experts" in {t.what for t in found}) == (size < layout.world_size)


def test_seconds_are_those_of_the_slower_link() -> None:
    interconnect = cluster("interconnect.within_node_gb_per_s=10", "interconnect.between_nodes_gb_per_s=4").interconnect
    assert Traffic("", "all-to-all", 8, 0, 5e9, 0.0, 8).seconds(interconnect) == 0.5
    # Eight ranks share the node's link to the others.
    assert Traffic("", "all-to-all", 8, 0, 5e9, 1e9, 8).seconds(interconnect) == 2.0


def test_what_repeats_a_forward_pass_repeats_its_exchange() -> None:
    def exchanged(*overrides: str) -> int:
        plan = make_plan(large(*overrides), cluster())
        (found,) = [traffic.handed for traffic in plan.traffic if traffic.what == "tokens to experts"]
        return found

    rows, layers, micro_batches = 2 * 4096 * 8, 20, 2
    hidden, weight, counts = rows * 1536 * 2, rows * 4, 128 * 8

    def expected(forward: int) -> int:
        return layers * micro_batches * ((forward + 1) * (2 * hidden + weight) + forward * counts)

    exact = "routing.balance.load_balancing_loss.estimator=exact"
    assert exchanged("training.activation_checkpointing=false") == expected(1)
    assert exchanged() == expected(2)
    assert exchanged(exact) == expected(3)
    # One micro-batch a step is counted by its own pass.
    assert exchanged(exact, "training.global_batch_size=128") == expected(2) // 2


def too_large(*overrides: str) -> Plan:
    plan = make_plan(
        large("training.activation_checkpointing=false", "training.micro_batch_size=4", *overrides), cluster()
    )
    assert not plan.fits
    return plan


@pytest.mark.parametrize(
    "overrides",
    [["model.num_layers=48"], ["model.num_layers=40", "parallel.expert_parallel_size=1"], ["model.num_layers=120"]],
    ids=str,
)
def test_every_remedy_makes_it_fit(overrides: list[str]) -> None:
    plan = too_large(*overrides)
    found = remedies(plan)
    assert found
    for remedy in found:
        settings = ["training.activation_checkpointing=false", "training.micro_batch_size=4", *overrides]
        assert make_plan(large(*settings, *remedy.split()), plan.cluster).fits


def test_the_least_change_is_proposed() -> None:
    plan = too_large("model.num_layers=48")
    found = dict(remedy.split("=") for remedy in remedies(plan))
    assert found["training.activation_checkpointing"] == "true"
    micro = int(found["training.micro_batch_size"])
    if micro < 2:
        too_large("model.num_layers=48", f"training.micro_batch_size={2 * micro}")


def test_what_no_setting_mends_has_no_remedy() -> None:
    assert remedies(too_large("model.hidden_size=15360", "model.num_layers=100")) == []


def test_a_plan_of_512_gpus_takes_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", LARGE, "--cluster", SLURM, "--set", "nodes=64", "training.global_batch_size=1024"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("large on slurm_h100: 512 ranks, 64 nodes of 8 GPUs\n")
    for line in (
        "data-parallel           512  one group, across 64 nodes",
        "expert-parallel           8  64 groups, each within a node",
        "expert-data-parallel     64  8 groups, each across 64 nodes",
        "A step of 1024 sequences: 512 ranks x 1 micro-batch x 2 sequences of 4096 tokens.",
        "112 to 127  7, 15, 23, 31, ..., 511",
    ):
        assert line in text.splitlines()
    assert text.splitlines()[-1].startswith("It fits, with ")


def test_one_process_sends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    laptop = ["--cluster", "configs/clusters/laptop.yaml", "--set", "gpus_per_node=1"]
    assert main(["plan", "configs/experiments/tiny.yaml", *laptop]) == 0
    text = capsys.readouterr().out
    assert "tiny on laptop: 1 rank, 1 node of 1 process\n" in text
    assert "Nothing is sent: there is one rank." in text


def test_what_does_not_fit_is_said_with_what_mends_it(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["plan", LARGE, "--cluster", SLURM, "--set", "gpu_memory_gb=24", "training.activation_checkpointing=false"]
    assert main(small) == 1
    *_, verdict, remedy = capsys.readouterr().out.splitlines()
    assert verdict.startswith("It does not fit: ") and "Most is taken by activations" in verdict
    assert remedy.startswith("It would fit with training.activation_checkpointing=true")
    hopeless = ["plan", LARGE, "--cluster", SLURM, "--set", "gpu_memory_gb=1"]
    assert main(hopeless) == 1
    assert "it needs GPUs with more memory" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["parallel.expert_parallel_size=16"],
            "parallel.expert_parallel_size is 16, so that the ranks 0 to 15 share their experts across the nodes 0, 1",
        ),
        (["--set", "nodes=3"], "training.global_batch_size is 256, which 24 ranks"),
        (["--set", "nodez=3"], "unknown key 'nodez'. Did you mean 'nodes'?"),
        (
            ["routing.router={name: reference, inside: all}", "routing.balance=none"],
            "routing.router.inside: all uses every expert of a token's group",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LARGE, "--cluster", SLURM, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_groups_across_nodes_are_planned_where_they_are_wanted() -> None:
    with pytest.raises(ConfigError, match="across the nodes"):
        make_plan(large("parallel.expert_parallel_size=64"), cluster())
    wanted = large("parallel.expert_parallel_size=64", "parallel.expert_parallel_across_nodes=true")
    exchange = make_plan(wanted, cluster()).traffic[0]
    assert exchange.between / (exchange.within + exchange.between) == pytest.approx(56 / 63)


def test_a_plan_needs_neither_deepspeed_nor_mlflow() -> None:
    code = f"""
import sys
from moe_testbed.launcher.cli.main import main
main(["plan", "{LARGE}", "--cluster", "{SLURM}"])
assert not {{"deepspeed", "mlflow"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
