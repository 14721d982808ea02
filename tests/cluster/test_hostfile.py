"""Hostfiles: what is read, and what is refused with one line that says where and how to mend it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import meeting_place, read_hosts
from moe_testbed.launcher.errors import ConfigError


def cluster(hostfile: Path | None, nodes: int = 2) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {
            "name": "trial",
            "nodes": nodes,
            "gpus_per_node": 4,
            "gpu_memory_gb": 80,
            "interconnect": {"within_node_gb_per_s": 400, "between_nodes_gb_per_s": 50},
            "launcher": "deepspeed",
            "hostfile": None if hostfile is None else str(hostfile),
        }
    )


def test_hosts_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# of the rack on the left\n\n  b.example.org   slots=4\na slots=4  \n")
    assert read_hosts(cluster(file)) == ["b.example.org", "a"]


@pytest.mark.parametrize(
    "text",
    [
        "# comment\nb-1.example.org slots=4\n\nroot@10.0.0.7\tslots=4\n",
        "a slots=4 max_slots=4\nb slots=4 max_slots=8\n",
        "a slots=4 # rack 3\n  # rack 4\nb slots=4;rack=4\n",
    ],
)
def test_deepspeed_reads_the_same(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    runner = pytest.importorskip("deepspeed.launcher.runner")
    assert list(runner.fetch_hostfile(str(file))) == read_hosts(cluster(file))


def test_processes_meet_at_the_first_host_or_where_the_cluster_says(tmp_path: Path) -> None:
    asked = cluster(tmp_path / "hosts")
    assert meeting_place(asked, ["me@b.example.org", "a"]) == "b.example.org"
    assert meeting_place(asked, ["b", "a"]) == "b"
    assert meeting_place(asked.model_copy(update={"master_addr": "10.0.0.7"}), ["b", "a"]) == "10.0.0.7"
    assert meeting_place(cluster(None, nodes=1), []) == "127.0.0.1"


def test_no_hostfile_is_no_host() -> None:
    assert read_hosts(cluster(None, nodes=1)) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=4\nb\n", r"hosts, line 2: 'b' is no host; write `HOST slots=N`, such as `node1 slots=4`"),
        ("a slots=4\nb slots=four\n", r"line 2: 'b slots=four' is no host"),
        ("-oProxyCommand=x slots=4\nb slots=4\n", r"line 1: '-oProxyCommand=x slots=4' is no host"),
        ("node[1-2] slots=4\n", r"line 1: 'node\[1-2\] slots=4' is no host"),
        ("a slots=4\na slots=4\n", r"line 2: a is there already"),
        ("a slots=4\nb slots=8\n", r"line 2: b has slots=8, but gpus_per_node of cluster trial is 4; make them equal"),
        ("a slots=4\n", r"names 1 hosts, but nodes of cluster trial is 2; make them equal, in the file or by --set"),
        ("", r"names 0 hosts"),
    ],
)
def test_what_does_not_fit_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_hosts(cluster(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*hosts cannot be read .* write one line `HOST slots=4`"):
        read_hosts(cluster(tmp_path / "hosts"))
