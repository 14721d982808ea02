"""The one deepspeed command that starts a training on the hosts of a cluster."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moe_testbed.data.machine import usable_cores
from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import hostfile_of, meeting_place
from moe_testbed.launcher.cluster.launch.preflight import SSH_OPTIONS
from moe_testbed.launcher.cluster.launch.variables import kept_from_deepspeed, start_script
from moe_testbed.launcher.run.files import write_atomically, write_privately
from moe_testbed.launcher.run.folder import RunFolder


@dataclass(frozen=True)
class Command:
    """Says what is started here.

    Attributes:
        arguments: those of the process.
        settings: what the process has beyond the environment of this one.
        variables: more of that, whose values are shown to nobody.
        withheld: names of variables of this process that the other one does not have.
        hosts: the file from which deepspeed reads the hosts, and its content.
        script: the file that starts a process on another host with its variables, and its content.
    """

    arguments: list[str]
    settings: dict[str, str]
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    withheld: list[str] = field(default_factory=list)
    hosts: tuple[Path, str] | None = None
    script: tuple[Path, str] | None = field(default=None, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """Returns the environment of the process."""
        inherited = {name: value for name, value in os.environ.items() if name not in self.withheld}
        return inherited | self.settings | self.variables

    def write_files(self) -> None:
        """Writes the files; other users cannot read the script."""
        if self.hosts is not None:
            write_atomically(*self.hosts)
        if self.script is not None:
            write_privately(*self.script)

    def remove_script(self) -> None:
        """Removes the script, if it is still this one: another launch may have begun after the end of this one."""
        if self.script is not None:
            path, text = self.script
            with contextlib.suppress(FileNotFoundError):
                if path.read_bytes() == text.encode("utf-8", "surrogateescape"):
                    path.unlink()

    def __str__(self) -> str:
        """Returns the command as a shell takes it, without the values of the variables."""
        withheld = ["env", *(f"-u {shlex.quote(name)}" for name in self.withheld)] if self.withheld else []
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.settings.items()]
        variables = [f"{name}=..." for name in self.variables]
        return " ".join([*withheld, *settings, *variables, shlex.join(self.arguments)])


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
        ConfigError: deepspeed's file for variables has a line that is none.
    """
    settings = {name: value for name, value in _defaults(cluster).items() if name not in cluster.environment}
    variables = {**cluster.environment, **variables}
    arguments = [str(Path(sys.executable).with_name("deepspeed")), "--quiet"]
    training = ["train", str(folder.config_file), "--run-dir", str(folder.path), *(["--trust"] if trust else [])]
    here = ["--master_port", str(cluster.master_port), "--module", "moe_testbed.launcher", *training]
    if not hosts:
        # A hostfile that is none: otherwise it would look for one at a place of its own.
        arguments += ["--hostfile", os.devnull, "--num_accelerators", str(cluster.gpus_per_node)]
        return Command([*arguments, *here], settings, variables)
    arguments += ["--hostfile", str(folder.launch_hosts_file)]
    written = folder.launch_hosts_file, hostfile_of(hosts, cluster)
    # Otherwise it would take the first of the first host's addresses, which may be of no use to the others.
    place = ["--master_addr", meeting_place(cluster, hosts)]
    if node_rank is not None:
        arguments += ["--no_ssh", "--node_rank", str(node_rank), *place, *here]
        return Command(arguments, settings, variables, hosts=written)
    # Forced, since it would start a single host's processes here. It need not try ssh: `launch` has.
    arguments += ["--force_multi", "--no_ssh_check", "--ssh_port", str(cluster.ssh_port), *place]
    arguments += ["--master_port", str(cluster.master_port)]
    # The script runs in place of a module and finds the local rank among its variables.
    arguments += ["--no_python", "--no_local_rank", "/bin/sh", str(folder.launch_script_file), *training]
    kept = kept_from_deepspeed(os.environ)
    options = [*shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "")), *SSH_OPTIONS]
    return Command(
        arguments,
        # The script has what deepspeed's own files say of variables.
        {"DS_ENV_FILE": os.devnull, "PDSH_SSH_ARGS_APPEND": " ".join(options)},
        withheld=[*kept],
        hosts=written,
        script=(folder.launch_script_file, start_script({**kept, **settings}, variables)),
    )


def _defaults(cluster: ClusterConfig) -> dict[str, str]:
    if cluster.accelerator == "cuda":
        return {}
    # Each process would otherwise take all cores of its node.
    return {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, usable_cores() // cluster.gpus_per_node))}
