"""The helper itself: a rank that fails is told, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from moe_testbed.launcher.ranks.ranks import Ranks


def sum_of_ranks() -> torch.Tensor:
    total = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(total)
    return total


def fail_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()


def test_every_rank_returns(run_on_ranks: Callable[..., list[torch.Tensor]]) -> None:
    assert run_on_ranks(sum_of_ranks, 2) == [3, 3]


def test_a_failure_carries_its_traceback(run_on_ranks: Callable[..., list[torch.Tensor]]) -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1: Traceback.*fail_on_rank_1.*ValueError: the reason"):
        run_on_ranks(fail_on_rank_1, 2)


def test_a_seed_is_torchs() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(2**62 + 5))
    Ranks(0, 1, torch.device("cpu"), None).seed(2**62 + 5)
    assert torch.equal(torch.rand(3), expected)
