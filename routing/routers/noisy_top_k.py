"""Top-k of logits with learned noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.routing.learned import LinearScore
from moe_testbed.routing.records import Noise, RouterSetting, RoutingContext
from moe_testbed.routing.router import ROUTERS, Capability, Scores
from moe_testbed.routing.routers.parts.hashing import uniform_from_keys
from moe_testbed.routing.routers.top_k import TopK, TopKConfig


class NoisyTopKConfig(TopKConfig):
    """Options of ``noisy_top_k``."""

    name: str = "noisy_top_k"

    @property
    def provides(self) -> frozenset[Capability]:
        """What ``top_k`` provides, and noise."""
        return super().provides | {Capability.NOISE}


def normal_from_keys(dtype: torch.dtype, *keys: Tensor | int) -> Tensor:
    """Draws from N(0, 1): the quantiles of :func:`uniform_from_keys`, each taken in the middle of its 2^-24, so that
    none is infinite and they are symmetric."""
    centred = 2 * uniform_from_keys(*keys) - 1 + 2.0**-24
    return math.sqrt(2) * torch.erfinv(centred.to(dtype))


@ROUTERS.register("noisy_top_k")
class NoisyTopK(TopK):
    """``z = W x + eps * softplus(W_n x)`` with eps from N(0, 1), then as ``top_k``; no noise in evaluation.

    With normalised weights ``g = softmax(z_S)`` as in Shazeer et al. (arXiv 1701.06538, equations 3-5), where the
    balancers ``importance`` and ``load`` belong to it. W_n starts at 0 as there (appendix A), so that the noise starts
    with a standard deviation of ln 2 for all. eps is a function of (seed, layer, sequence, position, expert).

    Oracle: ``route_noisy_top_k`` in tests/routing/oracles_learned.py.
    """

    Config = NoisyTopKConfig
    config: NoisyTopKConfig

    def __init__(self, config: NoisyTopKConfig, setting: RouterSetting) -> None:
        super().__init__(config, setting)
        self.noise_scorer = LinearScore(setting.hidden_size, setting.num_experts)
        nn.init.zeros_(self.noise_scorer.weight)

    def score(self, x_TM: Tensor, context: RoutingContext) -> Scores:
        if not self.training:
            return super().score(x_TM, context)
        clean_TE = self.scorer(x_TM)
        noise = Noise(clean_TE, F.softplus(self.noise_scorer(x_TM)))
        logits_TE = clean_TE + self.draws_TE(context, clean_TE.dtype) * noise.scale_TE
        return Scores.by_softmax(logits_TE, noise)

    def draws_TE(self, context: RoutingContext, dtype: torch.dtype) -> Tensor:
        """Returns eps, [T, E]."""
        experts_E = torch.arange(self.setting.num_experts, device=context.token_ids_BL.device)
        sequence_T1, position_T1 = context.sequence_T[:, None], context.position_BL.reshape(-1, 1)
        return normal_from_keys(dtype, self.setting.seed, self.setting.layer, sequence_T1, position_T1, experts_E)
