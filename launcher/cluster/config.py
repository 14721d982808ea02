"""What a cluster is: the typed content of configs/clusters/*.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from moe_testbed.launcher.config.messages import validate
from moe_testbed.launcher.config.names import NAME_PATTERN
from moe_testbed.launcher.config.yaml_tree import Node, Rules, find_file, lookup, read_layers

TIME_PATTERN = r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$"

_OF_EACH_PROCESS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
_OF_DEEPSPEED = ("MASTER_ADDR", "MASTER_PORT")

# What stands in a line of a script must not begin another.
Word = Annotated[str, Field(pattern=r"^\S+$")]
Line = Annotated[str, Field(pattern=r"^[^\n]+$")]


class InterconnectConfig(BaseModel, extra="forbid", frozen=True):
    """Says how fast bytes move; the planner's times follow from it, nothing else does."""

    within_node_gb_per_s: float = Field(gt=0, description="from one GPU to the others of its node, in 1e9 B")
    between_nodes_gb_per_s: float = Field(gt=0, description="from one node to all others, in 1e9 B")


class SlurmConfig(BaseModel, extra="forbid", frozen=True):
    """Says what an sbatch script asks for."""

    partition: Word = Field(description="partition of the jobs; `sinfo` lists them")
    account: Word | None = Field(None, description="who pays; null: the user's default")
    time: str = Field("24:00:00", pattern=TIME_PATTERN, description="limit of a job, HH:MM:SS or D-HH:MM:SS")
    cpus_per_gpu: int | None = Field(None, gt=0, description="cores of each process; null: the partition's default")
    container: Line | None = Field(None, description="image for srun's --container-image (pyxis); null: none")
    container_mounts: tuple[Line, ...] = Field((), description="SOURCE:TARGET pairs for --container-mounts")
    modules: tuple[Line, ...] = Field((), description="loaded by `module load` before the training")
    setup: tuple[Line, ...] = Field((), description="lines of shell after the modules, such as the venv's activation")
    options: tuple[Line, ...] = Field((), description="further sbatch options, such as --exclusive or --qos=high")
    jobs_at_once: int = Field(4, gt=0, description="runs of a suite that may run at the same time")
    grace_seconds: int = Field(
        120, gt=0, description="how long before its end by time or preemption a job is told to write a checkpoint"
    )


class ClusterConfig(BaseModel, extra="forbid", frozen=True):
    """Describes nodes that are all alike, and how processes are started on them."""

    name: str = Field(pattern=NAME_PATTERN, description="name of the cluster")
    nodes: int = Field(gt=0, description="nodes of a training")
    gpus_per_node: int = Field(gt=0, description="GPUs of a node; one process each")
    accelerator: Literal["cuda", "cpu"] = Field(
        "cuda", description="cpu: no GPUs; gpus_per_node is then the number of processes of a node"
    )
    gpu_memory_gb: float = Field(gt=0, description="memory of a GPU, in 1e9 B; of a process where there are none")
    interconnect: InterconnectConfig
    launcher: Literal["deepspeed", "slurm"] = Field(
        description="deepspeed: `moe-testbed launch`; slurm: `moe-testbed slurm submit`"
    )
    hostfile: str | None = Field(
        None, description="lines `HOST slots=GPUS`, as deepspeed reads them; null: this machine alone"
    )
    ssh_port: int = Field(22, gt=0, lt=65536, description="port of ssh on the hosts")
    master_addr: str | None = Field(None, description="where the processes meet; null: the hostfile's first host")
    master_port: int = Field(29500, gt=0, lt=65536, description="where the processes meet on the first host")
    environment: dict[str, str] = Field(default_factory=dict, description="variables of every process")
    nodes_reach_mlflow: bool = Field(
        True, description="false: trainings write their folder only, and `moe-testbed sync` sends it later"
    )
    slurm: SlurmConfig | None = Field(None, description="needed where launcher is slurm")

    @property
    def num_gpus(self) -> int:
        """How many GPUs all nodes have together; as many processes train."""
        return self.nodes * self.gpus_per_node

    @model_validator(mode="after")
    def _launcher_has_its_part(self) -> ClusterConfig:
        if self.launcher == "slurm" and self.slurm is None:
            raise ValueError("launcher is slurm, but there is no part slurm; add `slurm: {partition: NAME}`")
        if self.launcher == "deepspeed" and self.nodes > 1 and self.hostfile is None:
            raise ValueError(
                f"nodes is {self.nodes} with launcher deepspeed, but there is no hostfile; name a file with a line "
                "`HOST slots=GPUS` for each node"
            )
        return self

    @field_validator("environment", mode="before")
    @classmethod
    def _numbers_are_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: json.dumps(item) if isinstance(item, (int, float)) else item for name, item in value.items()}

    @model_validator(mode="after")
    def _variables_can_be_set(self) -> ClusterConfig:
        for name, value in self.environment.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise ValueError(
                    f"environment has '{name}', which is no name of a variable; write letters, digits and _"
                )
            if name in _OF_EACH_PROCESS:
                raise ValueError(f"environment has {name}, which is another one in each process; leave it out")
            if name in _OF_DEEPSPEED and self.launcher == "deepspeed":
                raise ValueError(f"environment has {name}, which deepspeed sets; write {name.lower()} instead")
            if "\0" in value:
                raise ValueError(f"environment.{name} has a null character, which no variable can have; leave it out")
        return self


def load_cluster(path: str | Path, overrides: Iterable[str] = ()) -> ClusterConfig:
    """Returns the cluster in a YAML file, under overrides like ``nodes=8``.

    A ``hostfile`` is looked for beside the YAML file that names it.

    Raises:
        ConfigError: one line that says what is wrong, where, what is allowed and how to mend it.
    """
    cluster = validate(ClusterConfig, _with_variables_as_written(read_layers(path, overrides, Rules())), {})
    if cluster.hostfile is not None:
        folder = find_file(str(path), Path.cwd(), "command line").parent
        cluster = cluster.model_copy(update={"hostfile": str(folder / cluster.hostfile)})
    return cluster


def _with_variables_as_written(tree: Node) -> Node:
    """Returns the tree with numbers and truth values of the environment as their texts: 1.10 is not 1.1 there."""
    variables = lookup(tree, ["environment"])
    if not isinstance(tree.value, dict) or variables is None or not isinstance(variables.value, dict):
        return tree
    texts = {
        name: replace(node, value=node.written) if isinstance(node.value, (int, float)) else node
        for name, node in variables.value.items()
    }
    return replace(tree, value={**tree.value, "environment": replace(variables, value=texts)})
