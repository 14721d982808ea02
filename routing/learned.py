"""What learned routers are made of: score the experts, select K of them, weigh what they return.

Shape legend: T tokens, M model width, E experts, K choices, X features that are compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import Capability, Router, RouterConfig, Scores

# Above this many choices one sort is cheaper than one pass over the scores per choice.
_MAX_PASSES = 4


def full_precision_linear(x_TX: Tensor, weight: Tensor) -> Tensor:
    """``W x``, float32 (float64 for float64 inputs), for W of any number of rows and X columns, whatever the model's
    precision (Switch Transformers, arXiv 2101.03961, section 2.4)."""
    dtype = torch.promote_types(x_TX.dtype, torch.float32)
    # Under autocast F.linear would fall back to the low precision, and near ties would be decided by rounding.
    with torch.autocast(x_TX.device.type, enabled=False):
        return F.linear(x_TX.to(dtype), weight.to(dtype))


class Scorer(nn.Module):
    """Turns hidden states [T, M] into logits, float32 [T, E].

    Attributes:
        weight: the vector that stands for each expert in the score, [E, X].
    """

    weight: nn.Parameter


class LinearScore(Scorer):
    """``z = W x``.

    Args:
        hidden_size: M.
        num_outputs: experts scored.
        trainable: False leaves W as initialised (the frozen router of arXiv 2402.13089).
        std: standard deviation of W's initial entries.
    """

    def __init__(self, hidden_size: int, num_outputs: int, trainable: bool = True, std: float = 0.02) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden_size), requires_grad=trainable)
        if not self.weight.is_meta:
            # torch would load its compiler to draw nothing.
            nn.init.normal_(self.weight, std=std)

    def forward(self, x_TM: Tensor) -> Tensor:
        """Logits, float32 [T, num_outputs]."""
        return full_precision_linear(x_TM, self.weight)


@torch.no_grad()
def select_top_k(scores_TE: Tensor, top_k: int, bias_E: Tensor | None = None) -> Tensor:
    """The ``top_k`` experts with the highest score plus bias, best first.

    Args:
        scores_TE: scores; -inf bars an expert.
        top_k: K.
        bias_E: added for the selection only (loss-free balancing, arXiv 2408.15664).

    Returns:
        Expert ids, int64 [T, K]. The choice carries no gradient.
    """
    biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if top_k > _MAX_PASSES:
        return biased_TE.topk(top_k, dim=-1).indices
    # torch.topk on CPU costs several times as much as a few passes of max.
    chosen = []
    for choice in range(top_k):
        ids_T1 = biased_TE.max(dim=-1, keepdim=True).indices
        chosen.append(ids_T1)
        if choice + 1 < top_k:
            biased_TE = biased_TE.scatter(-1, ids_T1, float("-inf"))
    return torch.cat(chosen, dim=-1)


def normalises(wanted: bool | None, top_k: int) -> bool:
    """Whether weights are divided by their sum; without a wish, if there is more than one of them.

    Raises:
        ValueError: one weight is to be normalised: it would always be 1, and the router would get no gradient.
    """
    if wanted and top_k == 1:
        raise ValueError(
            "routing.router.normalise is true with model.moe.top_k 1: the only weight would always be 1 and the router "
            "would learn nothing from the loss; leave normalise out, or set it to false"
        )
    return top_k > 1 if wanted is None else wanted


def gathered(scores_TE: Tensor, expert_ids_TK: Tensor, normalise: bool) -> Tensor:
    """Scores of the chosen experts, divided by their sum if ``normalise``. Float32 [T, K], differentiable in the
    scores."""
    weights_TK = scores_TE.gather(-1, expert_ids_TK)
    if normalise:
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
    return weights_TK


def uniform(expert_ids_TK: Tensor) -> Tensor:
    """1/K for each choice. Float32 [T, K]."""
    return torch.full(expert_ids_TK.shape, 1.0 / expert_ids_TK.shape[1], device=expert_ids_TK.device)


class LinearRouterConfig(RouterConfig):
    """What routers with one linear score per expert can be balanced by."""

    @property
    def provides(self) -> frozenset[Capability]:
        """Scores, a bias, and the rows of W."""
        return frozenset({Capability.SCORES, Capability.SELECTION_BIAS, Capability.VECTORS})


class LinearRouter(Router):
    """``z = W x`` for all experts, and the K highest affinities plus bias; score and weigh are the router's own.

    Args:
        trainable: False leaves W as initialised.

    Attributes:
        scorer: makes z; a router that scores otherwise puts its own in place.
    """

    scorer: Scorer

    def __init__(self, config: Any, setting: RouterSetting, trainable: bool = True) -> None:
        super().__init__(config, setting)
        self.scorer = LinearScore(setting.hidden_size, setting.num_experts, trainable)

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_top_k(scores.affinity_TE, self.setting.top_k, context.bias_E)

    def vectors_EX(self) -> Tensor:
        return self.scorer.weight
