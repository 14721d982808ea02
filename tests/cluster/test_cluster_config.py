"""Cluster files: what is embedded, and one clear line for everything that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import load_cluster
from moe_testbed.launcher.cluster.layout import Layout, layout_of
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.config.yaml_tree import embedded_configs
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.sharing import check_placement

Write = Callable[[str, str], Path]
EMBEDDED = sorted(
    path.relative_to(embedded_configs()).as_posix() for path in embedded_configs().glob("clusters/*.yaml")
)

CLUSTER = """
    name: lab
    nodes: 2
    gpus_per_node: 4
    gpu_memory_gb: 80
    interconnect: {within_node_gb_per_s: 450, between_nodes_gb_per_s: 50}
    launcher: slurm
    slurm: {partition: gpu}
"""


@pytest.fixture
def lab(write: Write) -> Path:
    """lab.yaml in the working directory."""
    return write("lab.yaml", CLUSTER)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_clusters_load_from_any_folder(write: Write, name: str) -> None:
    write("empty.yaml", "")
    cluster = load_cluster(f"configs/{name}")
    assert cluster == load_cluster(name)
    assert cluster.name == Path(name).stem
    assert cluster.num_gpus == cluster.nodes * cluster.gpus_per_node
    if cluster.hostfile is not None:
        assert len(Path(cluster.hostfile).read_text().splitlines()) == cluster.nodes


def test_overrides_replace_what_the_file_says(lab: Path) -> None:
    cluster = load_cluster(lab, ["nodes=64", "slurm.account=physics", "environment={NCCL_DEBUG: INFO}"])
    assert (cluster.nodes, cluster.num_gpus) == (64, 256)
    assert cluster.slurm is not None
    assert (cluster.slurm.partition, cluster.slurm.account) == ("gpu", "physics")
    assert cluster.environment == {"NCCL_DEBUG": "INFO"}


def test_numbers_in_the_environment_need_no_quotes(lab: Path) -> None:
    cluster = load_cluster(lab, ["environment.NCCL_IB_DISABLE=1", "environment.RATIO=0.5", "environment.CHECK=true"])
    assert cluster.environment == {"NCCL_IB_DISABLE": "1", "RATIO": "0.5", "CHECK": "true"}


AS_WRITTEN = [
    "1.10",
    "3e-4",
    "1_000",
    "+5",
    "007",
    "0x10",
    "True",
    "false",
    "on",
    "2024-01-01",
    "12:30:00",
    ".inf",
    "a b",
]


def test_values_of_the_environment_are_the_texts_that_were_written(write: Write) -> None:
    values = {f"V{number}": text for number, text in enumerate(AS_WRITTEN)}
    lines = "".join(f"      {name}: {text} # a comment\n" for name, text in values.items())
    write("lab.yaml", f"{CLUSTER}    environment:\n{lines}      QUOTED: ' 1.10\u00e9'\n      EMPTY: ''\n")
    cluster = load_cluster("lab.yaml", ["environment.SET=1.10"])
    assert cluster.environment == values | {"QUOTED": " 1.10\u00e9", "EMPTY": "", "SET": "1.10"}


def test_a_hostfile_lies_beside_its_cluster_file(write: Write, tmp_path: Path) -> None:
    write("deep/two.yaml", CLUSTER.replace("launcher: slurm", "launcher: deepspeed\n    hostfile: hosts"))
    assert load_cluster("deep/two.yaml").hostfile == str(tmp_path / "deep" / "hosts")


BAD_INPUT = [
    (["slurm=null"], "launcher is slurm, but there is no part slurm; add `slurm: {partition: NAME}`"),
    (["slurm.partition=''"], 'slurm.partition is ""'),
    (["slurm.time=soon"], 'slurm.time is "soon"'),
    (["launcher=deepspeed"], "nodes is 2 with launcher deepspeed, but there is no hostfile; name a file with a line"),
    (["launcher=mpi"], "launcher is \"mpi\": input should be 'deepspeed' or 'slurm'"),
    (["node=3"], "unknown key 'node'. Did you mean 'nodes'?"),
    (["nodes=0"], "nodes is 0: input should be greater than 0"),
    (["interconnect.within_node_gb_per_s=0"], "interconnect.within_node_gb_per_s is 0: input should be greater than 0"),
    (["master_port=70000"], "master_port is 70000: input should be less than 65536"),
    (['slurm.options=["--exclusive\\ntouch x"]'], "slurm.options.0 is"),
    (["slurm.partition='gpu long'"], 'slurm.partition is "gpu long"'),
    (["environment={NCCL_DEBUG: [INFO]}"], "environment.NCCL_DEBUG is"),
    (["environment={NCCL_DEBUG: null}"], "environment.NCCL_DEBUG is null: input should be a valid string"),
    (["environment=[NCCL_DEBUG=INFO]"], 'environment is ["NCCL_DEBUG=INFO"]'),
    (
        ["environment={\u00c4: 1}"],
        "environment has '\u00c4', which is no name of a variable; write letters, digits and _",
    ),
    (["environment={1A: 1}"], "environment has '1A', which is no name of a variable"),
    (['environment={A: "a\\0b"}'], "environment.A has a null character, which no variable can have"),
    (["environment={LOCAL_RANK: 0}"], "environment has LOCAL_RANK, which is another one in each process; leave it out"),
    (["environment={'NCCL DEBUG': INFO}"], "environment has 'NCCL DEBUG', which is no name of a variable"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT, ids=lambda value: str(value)[:40])
def test_bad_input_gets_one_clear_line(lab: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster(lab, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_partition_has_no_default(write: Write) -> None:
    write("lab.yaml", CLUSTER.replace("partition: gpu", "account: physics"))
    with pytest.raises(
        ConfigError, match=r"^lab\.yaml:7: slurm\.partition is missing \(partition of the jobs; `sinfo` lists them\)"
    ):
        load_cluster("lab.yaml")


def test_a_file_that_is_not_there_is_told(lab: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file 'labs\.yaml'"):
        load_cluster("labs.yaml")


@pytest.mark.parametrize(("nodes", "ranks_per_node", "size"), [(1, 1, 1), (2, 4, 2), (2, 4, 8), (3, 2, 1)])
def test_groups_share_out_all_ranks(nodes: int, ranks_per_node: int, size: int) -> None:
    layout = Layout(nodes, ranks_per_node, size)
    everyone = list(range(nodes * ranks_per_node))
    parallel, data_parallel = layout.expert_parallel_groups, layout.expert_data_parallel_groups
    for groups in (parallel, data_parallel):
        assert sorted(rank for group in groups for rank in group) == everyone
    # Every rank that holds the same experts is in another group that shares experts.
    for first in parallel:
        for second in data_parallel:
            assert len(set(first) & set(second)) == 1
    assert {len(group) for group in data_parallel} == {layout.expert_data_parallel_size}
    assert [layout.node_of(rank) for rank in everyone] == [node for node in range(nodes) for _ in range(ranks_per_node)]


def test_groups_lie_within_nodes_unless_they_may_not(lab: Path, experiment: Path) -> None:
    cluster = load_cluster(lab)
    across = "parallel.expert_parallel_across_nodes=true"
    assert layout_of(load_experiment(experiment, ["parallel.expert_parallel_size=4"]), cluster) == Layout(2, 4, 4)
    with pytest.raises(ConfigError, match=r"the ranks 0 to 7 share their experts across the nodes 0, 1"):
        layout_of(load_experiment(experiment, ["parallel.expert_parallel_size=8"]), cluster)
    wide = load_experiment(experiment, ["parallel.expert_parallel_size=8", across])
    assert layout_of(wide, cluster).expert_parallel_groups == [range(8)]


def test_the_hosts_that_ranks_met_on_are_checked_as_they_are(experiment: Path) -> None:
    config = load_experiment(experiment, ["parallel.expert_parallel_size=2"])
    check_placement(config, ["a", "a", "b", "b"])
    with pytest.raises(ConfigError, match=r"the ranks 2 to 3 share their experts across the nodes b, a"):
        check_placement(config, ["a", "a", "b", "a"])
