"""The one deepspeed command that starts a training on the hosts of a cluster."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_testbed.data.machine import usable_cores
from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import meeting_place
from moe_testbed.launcher.cluster.launch.preflight import SSH_OPTIONS
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.run.files import write_privately
from moe_testbed.launcher.run.folder import RunFolder


@dataclass(frozen=True)
class Command:
    """Says what is started here.

    Attributes:
        arguments: those of the process.
        environment: what the process has beyond the environment of this one.
        exported: the file from which deepspeed reads the variables of processes on other hosts, and its content.
    """

    arguments: list[str]
    environment: dict[str, str]
    exported: tuple[Path, str] | None = None

    def write_exported(self) -> None:
        """Writes the file, if there is one; other users cannot read it."""
        if self.exported is not None:
            write_privately(*self.exported)

    def __str__(self) -> str:
        """Returns the command as a shell takes it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.arguments)])


def deepspeed_command(
    cluster: ClusterConfig,
    hosts: Sequence[str],
    node_rank: int | None,
    folder: RunFolder,
    variables: Mapping[str, str],
    trust: bool = False,
) -> Command:
    """Returns the command that trains the run whose folder holds its config.

    Args:
        hosts: those of the hostfile; none for this machine alone.
        node_rank: the host that this one is, whose processes start without ssh; None: ssh starts them on all hosts.
        variables: those of every process, beyond those of the cluster.
        trust: the run may be another user's.

    Raises:
        ConfigError: a variable cannot be passed on.
    """
    variables = {**_defaults(cluster), **cluster.environment, **variables}
    environment, exported = variables, None
    arguments = [str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    if not hosts:
        # A hostfile that is none: otherwise it would look for one at a place of its own.
        arguments += ["--hostfile", os.devnull, "--num_accelerators", str(cluster.gpus_per_node)]
    elif node_rank is not None:
        arguments += ["--hostfile", str(cluster.hostfile), "--no_ssh", "--node_rank", str(node_rank)]
    else:
        # Forced, since it would start a single host's processes here.
        arguments += ["--hostfile", str(cluster.hostfile), "--force_multi", "--ssh_port", str(cluster.ssh_port)]
        lines = (f"{name}={_exported(name, value)}\n" for name, value in variables.items())
        exported = folder.launch_environment_file, "".join(lines)
        options = [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *SSH_OPTIONS]
        environment = {"DS_ENV_FILE": str(exported[0]), "PDSH_SSH_ARGS_APPEND": " ".join(options)}
    if hosts:
        # Otherwise it would take the first of the first host's addresses, which may be of no use to the others.
        arguments += ["--master_addr", meeting_place(cluster, hosts)]
    arguments += ["--master_port", str(cluster.master_port), "--module", "moe_testbed.launcher", "train"]
    arguments += [str(folder.config_file), "--run-dir", str(folder.path), *(["--trust"] if trust else [])]
    return Command(arguments, environment, exported)


def _defaults(cluster: ClusterConfig) -> dict[str, str]:
    if cluster.accelerator == "cuda":
        return {}
    # Each process would otherwise take all cores of its node.
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, usable_cores() // cluster.gpus_per_node))}


def _exported(name: str, value: str) -> str:
    """Returns the value as deepspeed takes it: it puts double quotes around it, escapes nothing, and pdsh reads %."""
    if "\n" in value:
        raise ConfigError(f"environment.{name} has a line break, which deepspeed cannot pass on to hosts; leave it out")
    for character in '\\"$`':
        value = value.replace(character, f"\\{character}")
    return value.replace("%", "%%")
