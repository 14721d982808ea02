"""An experiment and a cluster file for the hosts of a `Network`, and the command that trains one on the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import yaml

from moe_testbed.launcher.config.experiment import ExperimentConfig, dump_config
from moe_testbed.launcher.run.files import read_json, read_json_lines
from tests.hosts.network import Host, Network, wait_until

# Of a start on two busy cores: deepspeed is imported by its runner, then on every host, then by every rank.
START_SECONDS = 400.0


class Trial:
    """A training that `launch` starts on all hosts.

    Args:
        network: its hosts.
        folder: where everything is written, on the disk that all hosts share.
        content: of the experiment.
        cluster: values beyond those of a plain cluster of one process per host.
    """

    def __init__(self, network: Network, folder: Path, content: dict[str, Any], **cluster: Any) -> None:
        self.hosts = network.hosts
        self.folder = folder
        self.run_dir = folder / "run"
        config = ExperimentConfig.model_validate(content)
        (folder / "experiment.yaml").write_text(dump_config(config), encoding="utf-8")
        slots = cluster.get("gpus_per_node", 1)
        names = [f"{host.name} slots={slots}\n" for host in self.hosts]
        (folder / "hosts").write_text("".join(names), encoding="utf-8")
        plain = {
            "name": "namespaces",
            "nodes": len(self.hosts),
            "gpus_per_node": slots,
            "accelerator": "cpu",
            "gpu_memory_gb": 4,
            "interconnect": {"within_node_gb_per_s": 5, "between_nodes_gb_per_s": 1},
            "launcher": "deepspeed",
            "hostfile": "hosts",
        }
        (folder / "cluster.yaml").write_text(yaml.safe_dump(plain | cluster), encoding="utf-8")

    def start(self, host: Host, *options: str) -> subprocess.Popen[str]:
        """`launch` on a host; what it and the ranks print goes to launch.log."""
        command = [
            sys.executable,
            "-m",
            "moe_testbed.launcher",
            "launch",
            "experiment.yaml",
            "--cluster",
            "cluster.yaml",
        ]
        with (self.folder / "launch.log").open("a") as log:
            return host.start(
                [*command, "--run-dir", "run", *options],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def launch(self, *options: str) -> int:
        """Launches from the first host, to the end; the exit status."""
        return self.start(self.hosts[0], *options).wait(START_SECONDS)

    @property
    def log(self) -> str:
        """All that was printed."""
        return (self.folder / "launch.log").read_text(encoding="utf-8", errors="replace")

    @property
    def status(self) -> dict[str, Any]:
        """Of the run."""
        return read_json(self.run_dir / "status.json")

    def losses(self) -> dict[int, float]:
        """By step, of what is written so far."""
        lines = read_json_lines(self.run_dir / "metrics.jsonl")
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        """Until the training has come so far; fails with what it printed if it ends before."""

        def has_come() -> bool:
            assert process.poll() is None, self.log
            return max(self.losses(), default=0) >= step

        wait_until(has_come, START_SECONDS, f"step {step}")

    def launcher(self, host: Host) -> psutil.Process:
        """`launch` itself on a host: the process to send signals to."""
        return psutil.Process(next(number for number, command in host.commands().items() if "launch" in command))

    def assert_ranks_end(self, seconds: float) -> None:
        """No rank is left on any host within so many seconds."""
        wait_until(lambda: not any(host.ranks() for host in self.hosts), seconds, "the ranks have ended")

    def assert_nothing_is_left(self, seconds: float = 30.0) -> None:
        """Nor is a launcher; those notice the end of ranks after a second."""
        wait_until(lambda: not any(host.commands() for host in self.hosts), seconds, "nothing is left on any host")
