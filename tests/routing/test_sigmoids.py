"""Shares of sigmoids where they underflow: against the same formula in float64, where none does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_testbed.launcher.analyze.families import FAMILIES
from moe_testbed.routing.router import Scores
from moe_testbed.routing.routers.parts.sigmoids import gathered_sigmoids

E = 4
FAR_BELOW = [[-89.0, -90.0, -91.0, -95.0], [-200.0, -204.0, -202.0, -201.0], [-650.0, -650.0, -655.0, -651.0]]
USUAL = [[0.3, -2.0, 5.0, 1.0], [-40.0, -41.0, 2.0, -80.0], [30.0, 20.0, -100.0, 0.0]]


def exact(logits_TE: Tensor) -> Tensor:
    affinity_TE = logits_TE.sigmoid()
    return affinity_TE / affinity_TE.sum(-1, keepdim=True)


def gradient(shares_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """Of a sum in which no two experts count the same."""
    (found,) = torch.autograd.grad((shares_TE * torch.arange(1, shares_TE.shape[1] + 1)).sum(), logits_TE)
    return found


@pytest.mark.parametrize("rows", [FAR_BELOW, USUAL, [*USUAL, *FAR_BELOW]])
def test_shares_and_their_gradients_are_those_of_float64(rows: list[list[float]]) -> None:
    logits_TE = torch.tensor(rows, requires_grad=True)
    oracle_TE = torch.tensor(rows, dtype=torch.float64, requires_grad=True)
    expected_TE = exact(oracle_TE)
    for shares_TE in (Scores.by_sigmoid(logits_TE).probabilities_TE, FAMILIES["deepseek_v3"].probabilities(logits_TE)):
        torch.testing.assert_close(shares_TE.double(), expected_TE, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            gradient(shares_TE, logits_TE).double(), gradient(exact(oracle_TE), oracle_TE), rtol=1e-4, atol=1e-6
        )


def test_where_nothing_underflows_the_bits_are_those_of_the_plain_formula() -> None:
    rows = (4 * torch.randn(500, 7)).tolist()
    logits_TE, plain_TE = (torch.tensor(rows, requires_grad=True) for _ in range(2))
    shares_TE, expected_TE = Scores.by_sigmoid(logits_TE).probabilities_TE, exact(plain_TE)
    assert torch.equal(shares_TE, expected_TE)
    assert torch.equal(gradient(shares_TE, logits_TE), gradient(expected_TE, plain_TE))


def test_weights_of_the_chosen_sum_to_one_also_where_they_underflow() -> None:
    logits_TE = torch.tensor([*USUAL, *FAR_BELOW], requires_grad=True)
    oracle_TE = logits_TE.detach().double().requires_grad_()
    ids_TK = torch.tensor([[2, 3], [2, 0], [0, 1], [0, 1], [0, 3], [1, 0]])
    weights_TK = gathered_sigmoids(Scores.by_sigmoid(logits_TE), ids_TK, normalise=True)
    expected_TK = exact(oracle_TE.gather(-1, ids_TK))
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        gradient(weights_TK, logits_TE).double(), gradient(expected_TK, oracle_TE), rtol=1e-4, atol=1e-6
    )


def test_weights_that_are_not_divided_are_the_sigmoids_themselves() -> None:
    scores = Scores.by_sigmoid(torch.tensor(FAR_BELOW))
    ids_TK = torch.tensor([[0, 1]] * 3)
    assert torch.equal(gathered_sigmoids(scores, ids_TK, normalise=False), scores.affinity_TE[:, :2])


def test_barred_experts_have_no_share_and_what_is_left_has_all() -> None:
    scores = Scores.by_sigmoid(torch.tensor(FAR_BELOW))
    barred_TE = torch.tensor([[True, False, True, False]] * 3)
    shares_TE = scores.without(barred_TE).probabilities_TE
    expected_TE = exact(torch.tensor(FAR_BELOW, dtype=torch.float64).masked_fill(barred_TE, float("-inf")))
    torch.testing.assert_close(shares_TE.double(), expected_TE, rtol=1e-5, atol=1e-7)


def test_a_logit_that_is_no_number_stays_none() -> None:
    assert Scores.by_sigmoid(torch.tensor([[float("nan"), 1.0]])).probabilities_TE.isnan().all()
