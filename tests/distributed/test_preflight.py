"""What must be alike on all ranks is compared before they train."""

from __future__ import annotations

import dataclasses
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.preflight import Answer, compare
from tests.distributed import misfortunes
from tests.distributed.real_ranks import RealRanks

MakeExperiment = Callable[..., dict[str, Any]]
Run = Callable[..., list[Any]]

FIRST = Answer("node0", {"python": "3.11.7", "torch": "2.13.0"}, 1000.0, {"seed": "aa", "training": "bb"}, "cc")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"versions": {"python": "3.11.7", "torch": "2.14.0"}},
            "rank 2 on host node1 has torch 2.14.0, but rank 0 on host node0 has 2.13.0; install the same on all hosts",
        ),
        ({"clock": 1006.25}, "the clock of rank 2 on host node1 is 6.2 s ahead of that of rank 0 on host node0; at "),
        (
            {"clock": 993.0},
            "the clock of rank 2 on host node1 is 7.0 s behind that of rank 0 on host node0; at most ",
        ),
        (
            {"parts": {"seed": "aa", "training": "dd"}},
            "rank 2 on host node1 has another training in its configuration (digest dd) than rank 0 on host node0 (bb)",
        ),
        ({"data": "ee"}, "rank 2 on host node1 reads other data (digest ee of the token store) than rank 0 on host "),
    ],
)
def test_a_difference_names_rank_host_and_value(change: dict[str, Any], message: str) -> None:
    other = dataclasses.replace(FIRST, host="node1")
    with pytest.raises(ConfigError, match=re.escape(message)) as told:
        compare([FIRST, other, dataclasses.replace(other, **change)])
    assert "\n" not in str(told.value)


def test_a_little_difference_of_the_clocks_is_borne() -> None:
    compare([FIRST, dataclasses.replace(FIRST, host="node1", clock=1004.9)])


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("seed", "rank 1 on host {host} has another seed in its configuration (digest "),
        ("clock", "the clock of rank 1 on host {host} is 60.0 s ahead of that of rank 0"),
        ("node", "parallel.expert_parallel_size is 2, so that the ranks 0 to 1 share their experts across the nodes"),
    ],
)
def test_ranks_that_differ_do_not_train(
    difference: str, message: str, make_experiment: MakeExperiment, run_on_ranks: Run, tmp_path: Path
) -> None:
    training = make_experiment()["training"] | {"micro_batch_size": 4}
    config = make_experiment(training=training, parallel={"expert_parallel_size": 2})
    told = run_on_ranks(misfortunes.train_differently, 2, config, str(tmp_path / "run"), difference)
    for rank in told:
        assert rank["error"] == "ConfigError"
        # The clocks are read one after the other.
        assert re.sub(r"(?<=is )\d\d\.\d", "60.0", rank["message"]).startswith(message.format(host=rank["host"]))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_port_in_use_is_told_in_one_line(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        content = make_experiment(parallel={"slow_timeout_seconds": 1.0})
        with RealRanks(content, 1, tmp_path, tmp_path / "run", port) as ranks:
            assert ranks.exit_codes(120.0) == [2]
        line = (
            f"moe-testbed: MASTER_PORT is {port}, which is in use by another program on 127.0.0.1; choose a free port"
        )
        assert ranks.errors().strip().splitlines()[-1] == line
        assert "Traceback" not in ranks.errors()


@pytest.mark.slow
def test_a_rank_that_never_comes_is_told_in_one_line(make_experiment: MakeExperiment, tmp_path: Path) -> None:
    content = make_experiment(parallel={"slow_timeout_seconds": 2.0})
    with RealRanks(content, 2, tmp_path, tmp_path / "run", started=1) as ranks:
        assert ranks.exit_codes(120.0) == [2]
    assert "moe-testbed: not all of the 2 ranks came to port " in ranks.errors()
    assert "Traceback" not in ranks.errors()
