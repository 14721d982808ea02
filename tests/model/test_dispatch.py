"""Sorting the assignments against loops over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_testbed.model.dispatch import combine_rows, gather_rows, gather_weights, plan_dispatch
from moe_testbed.routing.records import NO_EXPERT

NUM_EXPERTS = 5


def random_ids(num_tokens: int, top_k: int, unused_share: float) -> Tensor:
    """Different experts for every token, some choices without one."""
    ids_TK = torch.rand(num_tokens, NUM_EXPERTS).argsort(dim=1)[:, :top_k]
    return ids_TK.masked_fill(torch.rand(num_tokens, top_k) < unused_share, NO_EXPERT)


CASES = pytest.mark.parametrize(
    ("num_tokens", "top_k", "unused_share"), [(9, 1, 0.0), (9, 2, 0.0), (9, 3, 0.4), (4, 2, 1.0), (1, 5, 0.0)]
)


def sorted_assignments(ids_TK: Tensor) -> list[tuple[int, int, int]]:
    """(expert, token, choice) in the order of the rows."""
    T, K = ids_TK.shape
    named = [(int(ids_TK[t, k]), t, k) for t in range(T) for k in range(K) if ids_TK[t, k] != NO_EXPERT]
    return sorted(named)


@CASES
def test_plan_sorts_by_expert_then_token(num_tokens: int, top_k: int, unused_share: float) -> None:
    ids_TK = random_ids(num_tokens, top_k, unused_share)
    plan = plan_dispatch(ids_TK, NUM_EXPERTS)
    rows = sorted_assignments(ids_TK)
    assert plan.token_A.tolist() == [token for _, token, _ in rows]
    assert plan.choice_A.tolist() == [token * top_k + choice for _, token, choice in rows]
    assert plan.counts_E.tolist() == [sum(expert == e for expert, _, _ in rows) for e in range(NUM_EXPERTS)]
    row_of = {(token, choice): row for row, (_, token, choice) in enumerate(rows)}
    for t in range(num_tokens):
        for k in range(top_k):
            assert plan.row_TK[t, k] == row_of.get((t, k), len(rows))


@CASES
def test_gather_and_combine_equal_a_loop_with_gradients(num_tokens: int, top_k: int, unused_share: float) -> None:
    ids_TK = random_ids(num_tokens, top_k, unused_share)
    plan = plan_dispatch(ids_TK, NUM_EXPERTS)
    x_TM = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    scale_E = torch.randn(NUM_EXPERTS, dtype=torch.float64)

    expert_A = torch.repeat_interleave(torch.arange(NUM_EXPERTS), plan.counts_E)
    factor_A = gather_weights(weights_TK, plan) * scale_E[expert_A]
    fast_TM = combine_rows(gather_rows(x_TM, plan).sin() * factor_A[:, None], plan)
    naive_TM = torch.stack(
        [
            sum(
                (
                    weights_TK[t, k] * x_TM[t].sin() * scale_E[ids_TK[t, k]]
                    for k in range(top_k)
                    if ids_TK[t, k] != NO_EXPERT
                ),
                start=x_TM[t] * 0,
            )
            for t in range(num_tokens)
        ]
    )
    torch.testing.assert_close(fast_TM, naive_TM)
    upstream_TM = torch.randn_like(naive_TM)
    fast = torch.autograd.grad(fast_TM, (x_TM, weights_TK), upstream_TM)
    naive = torch.autograd.grad(naive_TM, (x_TM, weights_TK), upstream_TM, allow_unused=True)
    for mine, oracle in zip(fast, naive, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if oracle is None else oracle)


def test_gradients_equal_finite_differences() -> None:
    plan = plan_dispatch(random_ids(6, 2, 0.3), NUM_EXPERTS)
    x_TM = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    y_AM = torch.randn(len(plan.token_A), 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, plan), (x_TM,))
    assert torch.autograd.gradcheck(lambda w: gather_weights(w, plan), (weights_TK,))
    assert torch.autograd.gradcheck(lambda y: combine_rows(y, plan), (y_AM,))


def test_low_precision_rows_keep_their_type_and_sum_in_float32() -> None:
    ids_TK = torch.tensor([[0, 1, 2, 3]])
    plan = plan_dispatch(ids_TK, NUM_EXPERTS)
    # Summed in bfloat16 one by one, the small rows would vanish beside the large one.
    rows_AM = torch.tensor([[256.0], [0.5], [0.5], [0.5]], dtype=torch.bfloat16, requires_grad=True)
    combined_TM = combine_rows(rows_AM, plan)
    assert combined_TM.dtype == torch.bfloat16
    assert combined_TM.item() == torch.tensor(257.5).bfloat16().item()
    combined_TM.sum().backward()
    assert rows_AM.grad is not None and rows_AM.grad.dtype == torch.bfloat16
