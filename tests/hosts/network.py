"""Several hosts on one machine: Linux namespaces with names, addresses and sshd of their own, joined by a switch.

Each host has its own network, host name, process numbers, ``/etc/hosts``, ``/etc/ssh``, ``/run`` and ``/dev/shm``; the
other files are this machine's, as on a cluster with a shared disk. Everything ends with the process that made it, even
by kill -9, and nothing of it can be seen from outside, so that several networks can stand side by side.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

PROGRAMS = ("ip", "nsenter", "pdsh", "setpriv", "ssh", "ssh-keygen", "sshd", "unshare")
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
START_SECONDS = 60.0

# An unshare ends with the thread that starts it, what is inside with the unshare.
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--fork", "--kill-child")

# Names are looked up in files only: a reverse look-up by DNS, which is not there, takes ten seconds. Shells start
# without this machine's files, which may wait for a lock: hosts that ended in the middle of it would leave it behind.
_START_HOST = """
set -e
hostname "$0"
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/nsswitch.conf" /etc/nsswitch.conf
mount --bind "$1/ssh" /etc/ssh
for file in /etc/bash.bashrc "$HOME/.bashrc"; do
  [ ! -e "$file" ] || mount --bind /dev/null "$file"
done
exec "$2" -D -e
"""

_SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/key.pub
PermitRootLogin prohibit-password
StrictModes no
MaxStartups 100
"""

_SSH_CONFIG = """
Host *
  IdentityFile /etc/ssh/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def missing() -> str | None:
    """What this machine lacks for hosts, in words; None if it can have them."""
    if sys.platform != "linux":
        return "Linux"
    if os.geteuid() != 0:
        return "root"
    programs = [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]
    if programs:
        return f"the programs {', '.join(programs)}"
    trial = subprocess.run(
        [*_UNSHARE[3:], "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
    )
    return None if trial.returncode == 0 else f"namespaces and bridges ({trial.stderr.strip()})"


class Host:
    """One of a `Network`.

    Attributes:
        name: that the others know it by.
        address: its IPv4 address.
        address_6: its IPv6 address.
        init: number of its first process, as seen from outside. Killing it is a crash of the host.
    """

    def __init__(self, name: str, address: str, folder: Path, switch: int) -> None:
        self.name = name
        self.address = address
        self.address_6 = f"2001:db8::{address.rpartition('.')[2]}"
        self._switch = switch
        sshd = shutil.which("sshd", path=SEARCH_PATH)
        command = [*_UNSHARE, "--uts", "--ipc", "--pid", "--mount-proc", "sh", "-c", _START_HOST, name, folder, sshd]
        self._holder = _start(command, folder / f"{name}.log")
        self.init = _only_child(self._holder.pid)
        self._pid_namespace = _pid_namespace(self.init)
        self._enter = ("nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid")
        # The switch's end of the cable has the host's name.
        _ip("link", "add", name, "netns", switch, "type", "veth", "peer", "name", "eth0", "netns", self.init)
        _ip("link", "set", name, "master", "br0", "up", inside=switch)
        _ip("address", "add", f"{address}/24", "dev", "eth0", inside=self.init)
        _ip("address", "add", f"{self.address_6}/64", "dev", "eth0", "nodad", inside=self.init)
        _ip("link", "set", "eth0", "up", inside=self.init)

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
        """Starts a command on this host. Signals reach it by its number, which `processes` gives, not by this object.

        Args:
            options: of `subprocess.Popen`.
        """
        return subprocess.Popen(self._inside(command, options), text=True, **options)

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
        """Runs a command on this host to its end.

        Args:
            options: of `subprocess.run`.
        """
        return subprocess.run(self._inside(command, options), text=True, **options)

    def _inside(self, command: Sequence[str | Path], options: dict[str, Any]) -> list[str | Path]:
        return [*self._enter, f"--wd={options.pop('cwd', os.getcwd())}", *command]

    def processes(self) -> list[psutil.Process]:
        """What runs here beside the host's own sshd; numbers as seen from outside."""
        here = (process for process in psutil.process_iter() if _pid_namespace(process.pid) == self._pid_namespace)
        return [process for process in here if _told(process, "name", None) not in (None, "sshd")]

    def commands(self) -> dict[int, list[str]]:
        """Their command lines, by number."""
        found = {process.pid: _told(process, "cmdline", None) for process in self.processes()}
        return {number: command for number, command in found.items() if command}

    def ranks(self) -> dict[int, psutil.Process]:
        """The ranks of a training that are here, by rank; several trainings at once would be mixed up."""
        trainings = [process for process in self.processes() if _trains(_told(process, "cmdline", []))]
        found = {_told(process, "environ", {}).get("RANK"): process for process in trainings}
        return {int(rank): process for rank, process in found.items() if rank is not None}

    def unplug(self) -> None:
        """Cuts the link: what is sent is lost, and nobody is told."""
        _ip("link", "set", self.name, "nomaster", inside=self._switch)

    def plug(self) -> None:
        """Mends the link."""
        _ip("link", "set", self.name, "master", "br0", inside=self._switch)

    def crash(self) -> None:
        """Ends everything on this host at once."""
        self._holder.kill()
        self._holder.wait()


class Network:
    """Hosts ``node1`` to ``nodeN``, ended on leaving the context. Root on each may ssh to all without a password."""

    def __init__(self, num_hosts: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="moe-testbed-hosts-"))
        addresses = {f"node{number}": f"10.77.0.{number}" for number in range(1, num_hosts + 1)}
        _write_files(self._folder, addresses)
        self._switch = _start([*_UNSHARE, "sleep", "infinity"], self._folder / "switch.log")
        switch = _only_child(self._switch.pid)
        _ip("link", "add", "br0", "type", "bridge", inside=switch)
        _ip("link", "set", "br0", "up", inside=switch)
        self.hosts = [Host(name, address, self._folder, switch) for name, address in addresses.items()]
        for host in self.hosts:
            wait_until(lambda: self._answers(host), START_SECONDS, f"sshd of {host.name}: {self._log(host)}")  # noqa: B023

    def _answers(self, host: Host) -> bool:
        return self.hosts[0].run(["ssh", host.name, "true"], capture_output=True).returncode == 0

    def _log(self, host: Host) -> str:
        return (self._folder / f"{host.name}.log").read_text(encoding="utf-8")

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.crash()
        self._switch.kill()
        self._switch.wait()
        shutil.rmtree(self._folder)


def wait_until(holds: Callable[[], object], seconds: float, what: str) -> None:
    """Polls until something holds.

    Raises:
        AssertionError: it did not within ``seconds``; names ``what``.
    """
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


def _write_files(folder: Path, addresses: Mapping[str, str]) -> None:
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    ssh = folder / "ssh"
    ssh.mkdir()
    (ssh / "sshd_config").write_text(_SSHD_CONFIG)
    (ssh / "ssh_config").write_text(_SSH_CONFIG)
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", ssh / name], check=True)


def _start(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            env=os.environ | {"PATH": SEARCH_PATH},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _only_child(parent: int) -> int:
    """Of an unshare, inside its namespaces."""
    wait_until(lambda: psutil.Process(parent).children(), START_SECONDS, f"child of process {parent}")
    return psutil.Process(parent).children()[0].pid


def _ip(*arguments: str | int, inside: int | None = None) -> None:
    enter = [] if inside is None else ["nsenter", f"--target={inside}", "--net"]
    command = [*enter, "ip", *(str(argument) for argument in arguments)]
    subprocess.run(command, env=os.environ | {"PATH": SEARCH_PATH}, check=True)


def _pid_namespace(process: int) -> str | None:
    try:
        return os.readlink(f"/proc/{process}/ns/pid")
    except OSError:
        return None


def _told(process: psutil.Process, question: str, otherwise: Any) -> Any:
    """What a process says of itself; ``otherwise`` if it has ended meanwhile."""
    try:
        return getattr(process, question)()
    except psutil.Error:
        return otherwise


def _trains(command: Sequence[str]) -> bool:
    """It is a rank, and not the launcher above it."""
    return "moe_testbed.launcher" in command and "deepspeed.launcher.launch" not in command
