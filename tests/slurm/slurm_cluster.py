"""A SLURM cluster of real daemons on this machine: four nodes, each with a host name and processes of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("node1", "node2", "node3", "node4")
_TOOLS = {"slurm-wlm": ("slurmctld", "slurmd", "sbatch", "srun"), "munge": ("munged",), "util-linux": ("unshare",)}

# Two partitions over the same nodes: a job of `urgent` takes them from one of `main`, which is told and queued again.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
ReturnToService=2
KillWait=5
MinJobAge=300
SlurmdTimeout=10
InactiveLimit=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def missing() -> str | None:
    """What keeps a cluster from being started here, in words; None if nothing does."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root, for the namespaces of its nodes"
    for package, names in _TOOLS.items():
        absent = [name for name in names if shutil.which(name) is None]
        if absent:
            return (
                f"a SLURM cluster needs {', '.join(absent)} (Debian package {package}; `make test-cluster` installs it)"
            )
    trial = subprocess.run([*_NAMESPACES, "true"], capture_output=True, text=True)
    if trial.returncode:
        return f"a SLURM cluster needs namespaces, which are refused here: {trial.stderr.strip()}"
    return None


_NAMESPACES = ("unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# Ends a daemon with the process that started it, however that ends.
_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
_BE_NODE = 'hostname "$0" && mount --bind "$1" /etc/hosts && exec slurmd -D -N "$0"'


class SlurmCluster:
    """The daemons, and what tests ask of them.

    Attributes:
        environment: variables by which SLURM's commands find this cluster.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        hosts = "".join(f"127.0.0.1 {name}\n" for name in ("localhost", host, *NODES))
        (folder / "hosts").write_text(hosts)
        ports = _free_ports(1 + len(NODES))
        gpus = folder / "gpu"
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000 Gres=gpu:2"
            for name, port in zip(NODES, ports[1:], strict=True)
        ]
        for number in range(2):
            os.mknod(f"{gpus}{number}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={gpus}[0-1]\n")
        text = _CONFIGURATION.format(host=host, port=ports[0], folder=folder, nodes="\n".join(nodes))
        (folder / "slurm.conf").write_text(text)

    def start(self) -> None:
        """Starts the daemons; returns when all nodes are idle."""
        folder = self._folder
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._run("munged", ["munged", "--foreground", "--force", *options, f"--log-file={folder}/munged.log"])
        wait_until(30, (folder / "munge.sock").exists, "munged did not start")
        self._run("slurmctld", ["slurmctld", "-D"])
        for name in NODES:
            self.start_node(name)
        self.wait_for_idle()

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node, in namespaces of its own."""
        self._run(name, [*_NAMESPACES, "sh", "-c", _BE_NODE, name, str(self._folder / "hosts")])

    def crash_node(self, name: str) -> None:
        """Ends everything that runs on a node at once, as a power cut does."""
        self._daemons[name].kill()
        self._daemons.pop(name).wait()

    def wait_for_idle(self) -> None:
        """Returns when all nodes can take jobs."""

        def idle() -> bool:
            return self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T").split() == ["idle"] * 4

        wait_until(60, idle, "the nodes did not become idle")

    def clear(self) -> None:
        """Cancels all jobs and brings back lost nodes."""
        self.call("scancel", "--user=root")
        for name in NODES:
            if name not in self._daemons:
                self.start_node(name)
        wait_until(60, lambda: not self.call("squeue", "--noheader"), "jobs did not end")
        self.wait_for_idle()

    def stop(self) -> None:
        """Ends the daemons and, with the namespaces, whatever still runs on the nodes."""
        for daemon in reversed(self._daemons.values()):
            daemon.kill()
            daemon.wait()

    def call(self, *command: str) -> str:
        """What a command of SLURM's prints; nothing while the controller does not answer."""
        environment = os.environ | self.environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60).stdout.strip()

    def log(self) -> str:
        """What the controller wrote last."""
        with contextlib.suppress(OSError):
            return (self._folder / "slurmctld.log").read_text()[-3000:]
        return ""

    def _run(self, name: str, command: list[str]) -> None:
        with (self._folder / f"{name}.out").open("ab") as output:
            environment = os.environ | self.environment
            self._daemons[name] = subprocess.Popen(
                [*_WITH_PARENT, *command], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )


def wait_until(seconds: float, condition: Callable[[], object], otherwise: str) -> None:
    """Polls; fails with the text if the condition does not come to hold."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
