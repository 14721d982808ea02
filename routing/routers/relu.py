"""As many experts as have a positive score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_testbed.routing.learned import LinearScore
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Capability, Router, RouterConfig, Scores
from moe_testbed.routing.routers.parts.varying import gathered_where_chosen, select_where

# Below this sum of gates their shares have no meaning, and gradients that would overflow.
_SMALLEST_SUM = 1e-6


class ReLUConfig(RouterConfig):
    """Options of ``relu``."""

    name: str = "relu"

    @property
    def provides(self) -> frozenset[Capability]:
        """Gates that an L1 penalty closes, and the rows of W. No bias: a selected expert must have a positive gate."""
        return frozenset({Capability.SCORES, Capability.RELU_GATES, Capability.VECTORS})

    @property
    def varying_top_k(self) -> bool:
        """Each positive gate is an expert; a token may have none."""
        return True


def shares_of_gates(gates_TE: Tensor) -> Tensor:
    """``g / sum g``, 1/E where no gate is open; rows sum to 1, differentiable."""
    sum_T1 = gates_TE.sum(-1, keepdim=True)
    open_T1 = sum_T1 > _SMALLEST_SUM
    # A division by 0 that is masked out afterwards would still put NaN in the gradient.
    shares_TE = gates_TE / sum_T1.where(open_T1, 1.0)
    return shares_TE.where(open_T1, 1.0 / gates_TE.shape[-1])


def scores_of(logits_TE: Tensor) -> Scores:
    """Gates are what is compared and weighted."""
    gates_TE = logits_TE.relu()
    return Scores(logits_TE, gates_TE, shares_of_gates(gates_TE), scores_of)


class OffsetScore(LinearScore):
    """``z = W x + c`` with most of it positive at the start: z has mean ``1 / sqrt(E)`` and half that as its standard
    deviation for x with entries of variance 1.

    Args:
        hidden_size: M.
        num_outputs: experts scored.
    """

    def __init__(self, hidden_size: int, num_outputs: int) -> None:
        start = num_outputs**-0.5
        super().__init__(hidden_size, num_outputs, std=0.5 * start * hidden_size**-0.5)
        self.offset = nn.Parameter(torch.full((num_outputs,), start))

    def forward(self, x_TM: Tensor) -> Tensor:
        """Logits, float32 [T, E]."""
        logits_TE = super().forward(x_TM)
        return logits_TE + self.offset.to(logits_TE.dtype)


@ROUTERS.register("relu")
class ReLU(Router):
    """``g = relu(z)``, ``S = {i: g_i > 0}`` (ReMoE, Wang et al., arXiv 2412.14711, equations 5-6): a route without any
    jump, so that all of it is trained by the loss. ``top_k`` is reached by the balancer ``l1_sparsity``.

    Training starts almost dense and closes gates; a gate that is closed for all tokens has no gradient and stays so.
    ReMoE's z has no offset c, and half of its gates are open at the start: in small trials the penalty then shrank W
    instead of closing gates, and top_k was not reached however far it grew. Here 98 % are open at the start, and their
    sum of E outputs is as large as one output. Balancers see ``g / sum g``.

    Oracle: ``route_relu`` in tests/routing/oracles_learned.py.
    """

    Config = ReLUConfig
    config: ReLUConfig

    def __init__(self, config: ReLUConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.scorer = OffsetScore(setting.hidden_size, setting.num_experts)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        return scores_of(self.scorer(x_TM))

    def select(self, scores: Scores, context: RoutingContext) -> Tensor:
        return select_where(scores.affinity_TE > 0, scores.affinity_TE)

    def weigh(self, scores: Scores, expert_ids_TK: Tensor) -> Tensor:
        return gathered_where_chosen(scores.affinity_TE, expert_ids_TK, normalise=False)

    def vectors_EX(self) -> Tensor:
        return self.scorer.weight
