"""Hostfiles: what is read, and what is refused with one line that says where and how to mend it."""

from __future__ import annotations

import codecs
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import hostfile_of, meeting_place, read_hosts
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


# Forms of a line, of which deepspeed's own reader says which name a host.
FORMS = [
    "{} slots=4",
    "  {}\tslots=4  ",
    "{} slots=4 max_slots=8",
    "{} slots=4 # rack 3",
    "{} slots=4;rack=4",
    "{} slots=04",
    "{} slots=4\r",
    "{}\u00a0slots=4",
    "{} slots=4\x0c{}x slots=4",
    "# {} slots=4",
    "#{} slots=4",
    "",
    "   \t",
    "{}",
    "{} slots=",
    "{} slots=four",
    "{} slots = 4",
    "{} SLOTS=4",
    "{} max_slots=4 slots=4",
    "{}slots=4",
    "slots=4",
    "{}:4",
    "{} 4",
    "{} # slots=4",
]
NAMES = [
    "node-b",
    "Node_B",
    "b.example.org",
    "10.0.0.7",
    "root@b",
    "me.too@b-1",
    "fd00::7",
    "2001:db8:0:1:2:3:4:5",
    "::1",
]
NO_ONE_HOST = [
    *("-oProxyCommand=x", "-b", "me@-b", "node[1-2]", "a,b", "[fd00::7]", "node1:22", "fd00::1%eth0", "50%"),
    *("^hosts", "b/c", "@b", "me@you@b", "b;ls", "$HOME", "\ufeffb", "#b@c"),
]


def theirs(file: Path) -> list[str] | None:
    """The hosts that deepspeed finds, None if it refuses the file."""
    try:
        return list(pytest.importorskip("deepspeed.launcher.runner").fetch_hostfile(str(file)))
    except ValueError:
        return None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_reads_the_same(tmp_path: Path, form: str, name: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"a slots=4\n{form.format(name, name)}\n\n# the end", newline="")
    expected = theirs(file)
    if expected is None:
        with pytest.raises(ConfigError, match=r"hosts, line 2: .* is no host"):
            read_hosts(cluster(file))
    else:
        assert read_hosts(cluster(file, nodes=len(expected))) == expected


@pytest.mark.parametrize("name", NO_ONE_HOST)
def test_what_deepspeed_reads_and_cannot_reach_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"a slots=4\n{name} slots=4\n")
    assert theirs(file) == (["a"] if name.startswith("#") else ["a", name])
    with pytest.raises(ConfigError, match=r"line 2: .* is no host that ssh and pdsh can log in to|names 1 hosts"):
        read_hosts(cluster(file))


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path, newline: str) -> None:
    file = tmp_path / "hosts"
    file.write_text(newline.join(["a slots=4", "b slots=4", ""]), encoding="utf-8-sig", newline="")
    assert theirs(file) == ["\ufeffa", "b"]
    assert read_hosts(cluster(file)) == ["a", "b"]


def test_what_deepspeed_is_given_is_what_was_read(tmp_path: Path) -> None:
    hosts = ["b", "root@10.0.0.7", "fd00::7", "me@2001:db8::1", "::1"]
    file = tmp_path / "hosts"
    file.write_text(hostfile_of(hosts, cluster(file)))
    assert theirs(file) == ["b", "root@10.0.0.7", "ssh:fd00::7", "ssh:me@2001:db8::1", "::1"]


def test_pdsh_logs_in_to_each_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("pdsh") is None:
        pytest.skip("there is no pdsh here")
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text('#!/bin/sh\necho "$@"\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(ssh.parent), prepend=os.pathsep)
    monkeypatch.setenv("PDSH_RCMD_TYPE", "ssh")
    hosts = ["a", *NAMES, "me@2001:db8::1"]
    names = [line.split()[0] for line in hostfile_of(hosts, cluster(None, nodes=1)).splitlines()]
    command = ["pdsh", "-N", "-w", ",".join(names), "%n"]
    calls = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    # Options of ssh's, the user among them, the host, and what is run there: its number.
    reached = {int(words[-1]): words[-2] for words in map(str.split, calls)}
    assert [reached[number] for number in sorted(reached)] == [host.rpartition("@")[2] for host in hosts]


def test_processes_meet_at_the_first_host_or_where_the_cluster_says(tmp_path: Path) -> None:
    asked = cluster(tmp_path / "hosts")
    assert meeting_place(asked, ["me@b.example.org", "a"]) == "b.example.org"
    assert meeting_place(asked, ["b", "a"]) == "b"
    assert meeting_place(asked, ["me@fd00::7", "a"]) == "fd00::7"
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
        ("a slots=4\nme@a slots=4\n", r"line 2: me@a is there already"),
        ("a slots=4\nb slots=0\n", r"line 2: b has slots=0, but gpus_per_node of cluster trial is 4"),
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


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_a_line_in_another_encoding_is_named(mark: bytes, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_bytes(mark + b"a slots=4\n" + "bücher slots=4\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"hosts, line 2 cannot be read .* write one line `HOST slots=4`.* in UTF-8"):
        read_hosts(cluster(file))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hostfile .*hosts cannot be read .* write one line `HOST slots=4`"):
        read_hosts(cluster(tmp_path / "hosts"))
