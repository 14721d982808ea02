"""The hosts of a cluster, as deepspeed reads them: lines ``HOST slots=GPUS``.

deepspeed's own reader, `fetch_hostfile`, names no line, prints the whole file, goes on without a file, and takes 1.5 s
to import.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.errors import ConfigError

# deepspeed ignores what follows. pdsh would read brackets and commas in a name as several hosts, ssh a leading dash as
# an option.
_LINE = re.compile(r"([\w.][\w.@-]*)\s+slots=(\d+)")


def meeting_place(cluster: ClusterConfig, hosts: Sequence[str]) -> str:
    """Returns the address of the first host, where its processes and those of the others meet.

    Args:
        hosts: those of the hostfile; none for this machine alone.
    """
    if not hosts:
        return "127.0.0.1"
    # USER@HOST is for ssh only.
    return cluster.master_addr or hosts[0].rpartition("@")[2]


def read_hosts(cluster: ClusterConfig) -> list[str]:
    """Returns the names of the hosts in the order of their ranks; none where there is no hostfile.

    Raises:
        ConfigError: the file is missing, has a line of another form, names a host twice, or does not fit the cluster.
    """
    if cluster.hostfile is None:
        return []
    try:
        text = Path(cluster.hostfile).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"hostfile {cluster.hostfile} cannot be read ({error}); write one line "
            f"`HOST slots={cluster.gpus_per_node}` for each host"
        ) from None
    hosts: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"{cluster.hostfile}, line {number}"
        found = _LINE.match(line.strip())
        if found is None:
            raise ConfigError(
                f"{where}: '{line.strip()}' is no host; write `HOST slots=N`, such as "
                f"`node1 slots={cluster.gpus_per_node}`"
            )
        host, slots = found[1], int(found[2])
        if host in hosts:
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
