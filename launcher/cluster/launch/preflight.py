"""Checks before a launch: are the programs there, can the hosts be reached, does each offer what the training needs?"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from moe_testbed.launcher.cluster.config import ClusterConfig
from moe_testbed.launcher.cluster.hostfile import meeting_place
from moe_testbed.launcher.cluster.launch.probe import Offer, probe
from moe_testbed.launcher.cluster.launch.variables import FOR_PYTHON
from moe_testbed.launcher.errors import ConfigError

SSH_OPTIONS = (
    # A question for a password would wait for ever.
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    # A host whose link is cut closes no connection.
    *("-o", "ServerAliveInterval=10"),
    *("-o", "ServerAliveCountMax=3"),
)
_SSH_FAILED = 255
_SECONDS = 120.0


def check_this_host(hosts: Sequence[str], cluster: ClusterConfig, run_dir: Path, is_first: bool) -> None:
    """Checks this host for processes that start here, without ssh.

    Args:
        hosts: those of the hostfile; none for this machine alone.
        is_first: the processes meet here.

    Raises:
        ConfigError: what is missing, in one line.
    """
    address = meeting_place(cluster, hosts)
    with _private_file(run_dir) as file:
        offer = probe(file, address, cluster.master_port, cluster.accelerator)
    _check_offer(offer, "this machine", address, cluster, run_dir, is_first)


def check_hosts(hosts: Sequence[str], cluster: ClusterConfig, run_dir: Path) -> None:
    """Checks hosts for processes that start on them by ssh.

    Raises:
        ConfigError: what is missing where, in one line.
    """
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"{program} is not on the PATH, by which deepspeed starts processes on hosts; install it, or start "
                "`moe-testbed launch ... --node-rank I` on each host"
            )
    for path in (os.getcwd(), str(run_dir), sys.executable):
        # pdsh reads %.
        if re.search(r"[^\w@+=:,./-]", path):
            raise ConfigError(
                f"'{path}' has characters that deepspeed cannot pass on to other hosts; choose a path of letters, "
                "digits and @+=:,./_-"
            )
    for name in FOR_PYTHON:
        if re.search(r'["$`\\%\n]', os.environ.get(name, "")):
            raise ConfigError(
                f"{name} is '{os.environ[name]}', of which deepspeed cannot pass on \", $, `, \\, % and line breaks to "
                "other hosts; choose paths without them, or `unset` it"
            )
    address = meeting_place(cluster, hosts)
    with ThreadPoolExecutor(max_workers=32) as pool, _private_file(run_dir) as file:
        offers = pool.map(lambda host: _ask(host, address, cluster, file), hosts)
        for number, (host, offer) in enumerate(zip(hosts, offers, strict=True)):
            _check_offer(offer, host, address, cluster, run_dir, is_first=number == 0)


@contextmanager
def _private_file(folder: Path) -> Iterator[Path]:
    """Makes a file that no other user can read, for as long as it is asked about."""
    with NamedTemporaryFile(prefix=".launch-", dir=folder) as file:
        yield Path(file.name)


def _ask(host: str, address: str, cluster: ClusterConfig, file: Path) -> Offer:
    question = [sys.executable, "-m", "moe_testbed.launcher.cluster.launch.probe"]
    question += [str(file), address, str(cluster.master_port), cluster.accelerator]
    remote = f"cd {shlex.quote(os.getcwd())} && {shlex.join(question)}"
    command = ["ssh", *SSH_OPTIONS, "-p", str(cluster.ssh_port), host, remote]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{host} has not answered by ssh within {_SECONDS:.0f} s; look what holds it up") from None
    reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode == _SSH_FAILED:
        raise ConfigError(
            f"{cluster.hostfile} names {host}, which ssh cannot reach ({reason}); correct the name, or see that "
            f"`ssh -p {cluster.ssh_port} {host} true` works without a password"
        )
    if done.returncode != 0:
        raise ConfigError(
            f"{host} cannot run moe-testbed ({reason}); {os.getcwd()} and {sys.executable} must be there as they are "
            "here"
        )
    # What a shell prints when it starts comes first.
    answer = (done.stdout.splitlines() or [""])[-1]
    try:
        return Offer(**json.loads(answer))
    except (TypeError, ValueError):
        raise ConfigError(
            f"{host} answered '{answer}' when asked what it offers; see that the same moe-testbed is installed there, "
            "and that its shell prints nothing when it ends"
        ) from None


def _check_offer(offer: Offer, host: str, address: str, cluster: ClusterConfig, run_dir: Path, is_first: bool) -> None:
    if not offer.sees_run:
        raise ConfigError(f"{host} does not see {run_dir}; choose --run-dir on a disk that all hosts share")
    if not offer.reads_run:
        raise ConfigError(
            f"{host} may not read what only you can read in {run_dir}, such as the variables of the processes; log in "
            "to the hosts as the user who launches"
        )
    if not offer.finds_address:
        raise ConfigError(
            f"{host} does not know {address}, where the processes would meet; choose an address of the first host that "
            "all hosts know by --set master_addr=ADDRESS"
        )
    if offer.gpus is not None and offer.gpus < cluster.gpus_per_node:
        raise ConfigError(
            f"gpus_per_node of cluster {cluster.name} is {cluster.gpus_per_node}, but torch sees {offer.gpus} on "
            f"{host}; lower it, in the hostfile as well, or look for the others with nvidia-smi"
        )
    if is_first and not offer.port_is_free:
        raise ConfigError(
            f"port {cluster.master_port} is in use on {host}, where the processes would meet; choose another by --set "
            "master_port=PORT"
        )
