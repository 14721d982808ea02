"""The hosts of a cluster, as deepspeed reads them: lines ``HOST slots=GPUS``.

deepspeed's own reader, `fetch_hostfile`, names no line, prints the whole file, goes on without a file, takes a
byte-order mark for a part of the first name, and takes 1.5 s to import. It gets the hosts as they were read here.
"""

from __future__ import annotations

import io
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.errors import ConfigError

# deepspeed ignores what follows.
_LINE = re.compile(r"(\S+)\s+slots=(\d+)")
_NAME = re.compile(r"[\w.][\w.-]*")


def meeting_place(cluster: ClusterConfig, hosts: Sequence[str]) -> str:
    """Returns the address of the first host, where its processes and those of the others meet.

    Args:
        hosts: those of the hostfile; none for this machine alone.
    """
    if not hosts:
        return "127.0.0.1"
    return cluster.master_addr or _address(hosts[0])


def read_hosts(cluster: ClusterConfig) -> list[str]:
    """Returns the names of the hosts in the order of their ranks; none where there is no hostfile.

    Raises:
        ConfigError: the file is missing, has a line of another form, names a host twice, or does not fit the cluster.
    """
    if cluster.hostfile is None:
        return []
    form = f"write one line `HOST slots={cluster.gpus_per_node}` for each host, in UTF-8"
    try:
        content = Path(cluster.hostfile).read_bytes()
    except OSError as error:
        raise ConfigError(f"hostfile {cluster.hostfile} cannot be read ({error}); {form}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"hostfile {cluster.hostfile}, line {number} cannot be read ({error}); {form}") from None
    lines = [line.strip() for line in io.StringIO(text, newline=None)]
    hosts: list[str] = []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        where = f"{cluster.hostfile}, line {number}"
        found = _LINE.match(line)
        if found is None:
            raise ConfigError(
                f"{where}: '{line}' is no host; write `HOST slots=N`, such as `node1 slots={cluster.gpus_per_node}`"
            )
        host, slots = found[1], int(found[2])
        if not _is_one_host(host):
            raise ConfigError(
                f"{where}: '{line}' is no host that ssh and pdsh can log in to, though deepspeed reads it; write "
                "[USER@]NAME or [USER@]ADDRESS of a single host, IPv6 without brackets, and its port as ssh_port in "
                "the cluster's file"
            )
        # Nor as another user: pdsh would start the processes of both lines there.
        if _address(host) in map(_address, hosts):
            raise ConfigError(f"{where}: {host} is there already; give each host one line")
        if slots != cluster.gpus_per_node:
            raise ConfigError(
                f"{where}: {host} has slots={slots}, but gpus_per_node of cluster {cluster.name} is "
                f"{cluster.gpus_per_node}; make them equal"
            )
        hosts.append(host)
    if len(hosts) != cluster.nodes:
        raise ConfigError(
            f"{cluster.hostfile} names {len(hosts)} hosts, but nodes of cluster {cluster.name} is {cluster.nodes}; "
            "make them equal, in the file or by --set nodes=N"
        )
    return hosts


def hostfile_of(hosts: Sequence[str], cluster: ClusterConfig) -> str:
    """Returns a hostfile that deepspeed and its pdsh read as `read_hosts` has read the cluster's."""
    # pdsh takes what stands before a single colon for the way to log in.
    names = [f"ssh:{host}" if ":" in host and not host.startswith("::") else host for host in hosts]
    return "".join(f"{name} slots={cluster.gpus_per_node}\n" for name in names)


def _address(host: str) -> str:
    """Returns a host without the user, who is for ssh only."""
    return host.rpartition("@")[2]


def _is_one_host(host: str) -> bool:
    """Tells whether ssh and pdsh take a word for one host: a dash before it would make an option of it, brackets,
    commas and slashes several hosts, % a placeholder."""
    user, at, name = host.rpartition("@")
    if at and not _NAME.fullmatch(user):
        return False
    if ":" not in name:
        return _NAME.fullmatch(name) is not None
    try:
        return ipaddress.IPv6Address(name).scope_id is None
    except ValueError:
        return False
