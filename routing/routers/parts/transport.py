"""Optimal transport from the tokens of a pool to the experts, each of which is to take the same share.

Shape legend: U tokens of a set, E experts, K choices, X places of all experts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_TOLERANCE = 1e-4
# exp of it is positive in float64, so that Sinkhorn's iteration converges whatever the logits are.
_LOWEST_LOGIT = -300.0

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@torch.no_grad()
def sinkhorn_bias(logits_UE: Tensor, max_iterations: int = 200) -> Tensor:
    """What to add to the logits so that softmax over them uses every expert equally.

    With ``A = exp(z)``, Sinkhorn and Knopp's iteration ``d0 = 1 / (N A d1)``, ``d1 = 1 / (E A^T d0)`` from ``d1 = 1``
    ends in the plan ``diag(d0) A diag(d1)``, whose rows sum to 1/U and whose columns sum to 1/E. Row t of the plan is
    ``softmax(z_t + log d1) / U``, so that ``log d1`` is all that is needed of it.

    It stops when no entry of d1 changes by more than 1e-4 of itself, or after the last iteration allowed. That change
    is how far the columns' sums were from 1/E, in parts of it. (Megatron looks at the mean absolute change, and has no
    bound.)

    Args:
        logits_UE: U at least 1; in a row or column no more than 300 below the highest counts.

    Returns:
        ``log d1``, [E].
    """
    # Rows and columns are scaled so that each holds a 1, which leaves the plan as it is.
    below_UE = logits_UE.double() - logits_UE.amax(1, keepdim=True)
    highest_E = below_UE.amax(0)
    A_UE = (below_UE - highest_E).clamp(min=_LOWEST_LOGIT).exp()
    U, E = A_UE.shape
    d1_E = A_UE.new_ones(E)
    for _ in range(max_iterations):
        before_E = d1_E
        d0_U = 1 / (U * (A_UE @ d1_E))
        d1_E = 1 / (E * (d0_U @ A_UE))
        if (before_E / d1_E - 1).abs().max() <= _TOLERANCE:
            break
    return (d1_E.log() - highest_E).to(logits_UE.dtype)


@torch.no_grad()
def balanced_assignment(scores_UE: Tensor, top_k: int) -> Tensor:
    """The assignment with the highest sum of scores among those that load all experts equally.

    For K > 1 the assignment is made K times, each time from the experts that a token does not have yet. After the r-th
    time every expert has ``r U / E`` tokens, rounded down or up.

    With K near E and U below it, the choices already made may leave no balanced one; then tokens take the best expert
    that they do not have, after prices.

    Costs 16 U^2 bytes and, at worst, time of O(U^3).

    Args:
        scores_UE: U at least 1.

    Returns:
        Expert ids, int64 [U, K], in the order in which they were given.
    """
    U, E = scores_UE.shape
    # What is not finite is for the guard behind the router to report; it must not stop the solver before.
    scores_UE = scores_UE.double().nan_to_num(0.0, 0.0, 0.0)
    lowest = scores_UE.min()
    taken_UE = torch.zeros_like(scores_UE, dtype=torch.bool)
    chosen = []
    for choice in range(1, top_k + 1):
        prices_E = _prices(scores_UE.masked_fill(taken_UE, lowest))
        values_UE = (scores_UE - prices_E).masked_fill(taken_UE, -torch.inf)
        load_E = taken_UE.sum(0)
        fewest_E, most_E = (choice * U // E - load_E).clamp(min=0), (-(-choice * U // E) - load_E).clamp(min=0)
        ids_U = _assign(*(part.cpu().numpy() for part in (values_UE, prices_E, fewest_E, most_E)))
        ids_U1 = torch.from_numpy(ids_U).to(scores_UE.device)[:, None]
        taken_UE.scatter_(1, ids_U1, True)
        chosen.append(ids_U1)
    return torch.cat(chosen, dim=1)


def _prices(scores_UE: Tensor) -> Tensor:
    """Prices of the experts, [E], at which about as many tokens want each of them.

    Every balanced assignment pays the same sum, so that prices change no solution, but they bring the solver near it:
    at a thousand tokens it is many times faster. They are those of Sinkhorn's plan at a low temperature.
    """
    temperature = max(0.05 * float(scores_UE.std(correction=0)), 1e-9)
    return -temperature * sinkhorn_bias(scores_UE / temperature, max_iterations=20)


def _assign(values_UE: Floats, prices_E: Floats, fewest_E: Ints, most_E: Ints) -> Ints:
    """The best expert for every token, [U], where each expert takes between ``fewest_E`` and ``most_E`` tokens.

    Args:
        values_UE: scores less prices; -inf bars an expert.
    """
    U, E = values_UE.shape
    required = np.repeat(np.arange(E), fewest_E)
    optional = np.repeat(np.arange(E), most_E - fewest_E)
    expert_X = np.concatenate([required, optional])
    # Tokens that score 0 everywhere fill the places that stay empty; they may not take a required one.
    values_XX = np.full((len(expert_X), len(expert_X)), -np.inf)
    values_XX[:U] = values_UE[:, expert_X]
    values_XX[U:, len(required) :] = -prices_E[optional]
    # Half a second that only this router pays.
    from scipy.optimize import linear_sum_assignment

    try:
        _, place_X = linear_sum_assignment(values_XX, maximize=True)
    except ValueError:
        return values_UE.argmax(1)
    return expert_X[place_X[:U]]
