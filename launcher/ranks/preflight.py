"""The preflight check: versions, clocks, configuration and data must be alike on all ranks before they train."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.heartbeat import host_name
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.ranks.sharing import check_placement
from moe_testbed.launcher.run.environment import versions

MOST_CLOCK_SECONDS = 5.0
"""The most by which the clocks of two hosts may differ: file times and logs of several hosts are compared."""

_ALIKE = ("python", "moe-testbed", "torch", "deepspeed")
# These parts of an experiment may differ among hosts.
_OWN = ("runtime", "tracking")


@dataclass(frozen=True)
class Answer:
    """What one rank says of itself.

    Attributes:
        host: name of its host.
        versions: package -> version, for the packages that results depend on.
        clock: seconds since 1970, read by all ranks at the same moment.
        parts: part of the experiment -> digest.
        data: digest of the token store.
    """

    host: str
    versions: dict[str, str]
    clock: float
    parts: dict[str, str]
    data: str


def check_preflight(config: ExperimentConfig, store: Store, ranks: Ranks) -> None:
    """Compares the ranks of a training with one another, if there are several.

    Raises:
        ConfigError: one of them differs from the first, or shares its experts with another node without leave to.
    """
    if ranks.group is None:
        return
    installed, parts, data = versions(), _digests(config), _digest(store.manifest)
    dist.barrier(group=ranks.group)
    answer = Answer(host_name(), {name: installed[name] for name in _ALIKE}, time.time(), parts, data)
    answers: list[Any] = [None] * ranks.size
    dist.all_gather_object(answers, answer, group=ranks.group)
    compare(answers)
    check_placement(config, [one.host for one in answers])


def compare(answers: list[Answer]) -> None:
    """Raises ConfigError, in one line, for the first rank that differs from rank 0."""
    first = answers[0]
    for rank, other in enumerate(answers):
        who, whom = f"rank {rank} on host {other.host}", f"rank 0 on host {first.host}"
        for name, version in other.versions.items():
            if version != first.versions[name]:
                raise ConfigError(
                    f"{who} has {name} {version}, but {whom} has {first.versions[name]}; install the same on all hosts"
                )
        ahead = other.clock - first.clock
        if abs(ahead) > MOST_CLOCK_SECONDS:
            raise ConfigError(
                f"the clock of {who} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} that of {whom}; at "
                f"most {MOST_CLOCK_SECONDS:g} s are allowed: let both follow a time server"
            )
        for part, digest in other.parts.items():
            if digest != first.parts.get(part):
                raise ConfigError(
                    f"{who} has another {part} in its configuration (digest {digest}) than {whom} "
                    f"({first.parts.get(part)}); start all ranks with the same file and overrides"
                )
        if other.data != first.data:
            raise ConfigError(
                f"{who} reads other data (digest {other.data} of the token store) than {whom} ({first.data}); let all "
                "hosts share data.cache_dir, or copy it from one to the others"
            )


def _digests(config: ExperimentConfig) -> dict[str, str]:
    parts = config.model_dump(mode="json", exclude={*_OWN})
    # The same data may lie in another place.
    parts["data"].pop("cache_dir")
    return {name: _digest(part) for name, part in parts.items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
