"""The small random problems on which a router is tried.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, E experts, K choices, V token ids, D domains, Y
MoE layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_testbed.routing.load import count_assignments
from moe_testbed.routing.records import NO_EXPERT, LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router, RouterConfig

B, L, M, V, D = 4, 8, 16, 40, 4
LAYER = 1
DOMAINS = ("prose", "code", "law", "music")
ROUNDING = 1e-5
"""Largest difference of weights that stands for rounding: sums may be taken in another order."""
SIZES = ((16, 2), (8, 2))
"""(E, K) in the order in which they are tried: some routers fix the relation of E, K and the number of domains."""


@dataclass(frozen=True)
class Trial:
    """A router's class and config in a setting.

    Attributes:
        router_class, config: the router's class and config.
        setting: what it is built for.
    """

    router_class: type[Router]
    config: RouterConfig
    setting: RouterSetting

    @classmethod
    def of(cls, router_class: type[Router], config: RouterConfig) -> Trial:
        """The trial with the first of ``SIZES`` for which the router can be built.

        Raises:
            ValueError: what the router says to the first of them, if it takes none.
        """
        refusals = []
        for num_experts, top_k in SIZES:
            generator = torch.Generator().manual_seed(3)
            counts_DV = torch.randint(1, 1000, (D, V), generator=generator)
            setting = RouterSetting(num_experts, top_k, M, LAYER, 7, DOMAINS, (0.4, 0.3, 0.2, 0.1), counts_DV)
            trial = cls(router_class, config, setting)
            try:
                trial.router()
            except ValueError as error:
                refusals.append(error)
            else:
                return trial
        raise refusals[0]

    def router(self, training: bool = False, seed: int = 1) -> Router:
        """A router whose matrices are drawn so wide that its scores lie apart. Torch's generator is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            router = self.router_class(self.config, self.setting)
            with torch.no_grad():
                for parameter in router.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(std=2.0 * parameter.shape[-1] ** -0.5)
        return router.train(training)


def decisions(trial: Trial, context: RoutingContext | None = None) -> dict[str, RoutingDecision]:
    """What a fresh router decides in training and in evaluation."""
    context = make_context() if context is None else context
    return {
        mode: trial.router(training=mode == "training")(hidden_states(context), context)
        for mode in ("training", "evaluation")
    }


def make_context(sequences: int = B, seed: int = 5) -> RoutingContext:
    """Packed sequences: two documents in each, whose domains differ."""
    generator = torch.Generator().manual_seed(seed)
    halves_B2 = torch.randint(D, (sequences, 2), generator=generator)
    return RoutingContext(
        token_ids_BL=torch.randint(V, (sequences, L), generator=generator),
        domain_BL=halves_B2.repeat_interleave(L // 2, dim=1),
        document_BL=torch.arange(2 * sequences).view(sequences, 2).repeat_interleave(L // 2, dim=1),
        position_BL=torch.arange(L).expand(sequences, L),
        sequence_B=100 * seed + torch.arange(sequences),
        step=2,
        layer=LAYER,
    )


def hidden_states(context: RoutingContext, seed: int = 11) -> Tensor:
    """Float32 [T, M]."""
    return torch.randn(context.token_ids_BL.numel(), M, generator=torch.Generator().manual_seed(seed))


def part_of(context: RoutingContext, sequences: slice) -> RoutingContext:
    """Some of the sequences."""
    assert context.document_BL is not None
    return replace(
        context,
        token_ids_BL=context.token_ids_BL[sequences],
        domain_BL=context.domain_BL[sequences],
        document_BL=context.document_BL[sequences],
        position_BL=context.position_BL[sequences],
        sequence_B=context.sequence_B[sequences],
    )


def on_device(context: RoutingContext, device: torch.device) -> RoutingContext:
    """The context on a device."""
    assert context.document_BL is not None
    return replace(
        context,
        token_ids_BL=context.token_ids_BL.to(device),
        domain_BL=context.domain_BL.to(device),
        document_BL=context.document_BL.to(device),
        position_BL=context.position_BL.to(device),
        sequence_B=context.sequence_B.to(device),
    )


def changed_where(context: RoutingContext, changed_BL: Tensor) -> RoutingContext:
    """Other token ids, labels and documents where ``changed_BL``."""
    assert context.document_BL is not None
    return replace(
        context,
        token_ids_BL=torch.where(changed_BL, (context.token_ids_BL + 1) % V, context.token_ids_BL),
        domain_BL=torch.where(changed_BL, (context.domain_BL + 1) % D, context.domain_BL),
        document_BL=torch.where(changed_BL, context.document_BL + 1, context.document_BL),
    )


def observe_step(router: Router, trial: Trial, seed: int) -> LayerStep:
    """Two micro-batches of an optimizer step as the model runs them; what ``finish_step`` is to be told."""
    counts_E, tokens = torch.zeros(trial.setting.num_experts, dtype=torch.int64), 0
    for micro in (0, 1):
        context = make_context(seed=seed + micro)
        decision = router(hidden_states(context, seed=seed + micro), context)
        router.observe(decision, context)
        counts_E += count_assignments(decision.expert_ids_TK, trial.setting.num_experts)
        tokens += context.token_ids_BL.numel()
    return LayerStep(counts_E, torch.tensor(tokens), lambda value: value)


def spread(decision: RoutingDecision, num_experts: int) -> tuple[Tensor, Tensor]:
    """How often each token uses each expert, int64, and with what weight, both [T, E]; so that choices of any number
    and order can be compared."""
    columns_TK = decision.expert_ids_TK - NO_EXPERT
    times_TE = columns_TK.new_zeros(len(columns_TK), num_experts + 1)
    weight_TE = decision.weights_TK.new_zeros(len(columns_TK), num_experts + 1)
    times_TE = times_TE.scatter_add(1, columns_TK, torch.ones_like(columns_TK))
    return times_TE[:, 1:], weight_TE.scatter_add(1, columns_TK, decision.weights_TK)[:, 1:]


def difference(
    a: RoutingDecision,
    b: RoutingDecision,
    num_experts: int,
    tokens_T: Tensor | slice = slice(None),
    tolerance: float = 0.0,
    scores: bool = True,
) -> str | None:
    """What differs between two decisions on the same tokens, in words; None if nothing does.

    Args:
        tokens_T: the tokens to compare.
        tolerance: of weights and scores, absolute.
        scores: compare probabilities and logits as well.
    """
    pairs = {"weights": (spread(a, num_experts)[1], spread(b, num_experts)[1])}
    if scores and a.probabilities_TE is not None and b.probabilities_TE is not None:
        pairs["probabilities"] = (a.probabilities_TE, b.probabilities_TE)
    if scores and a.logits_TE is not None and b.logits_TE is not None:
        pairs["logits"] = (a.logits_TE, b.logits_TE)
    if not torch.equal(spread(a, num_experts)[0][tokens_T], spread(b, num_experts)[0][tokens_T]):
        return "experts"
    for name, (one_TE, other_TE) in pairs.items():
        one_TE, other_TE = one_TE[tokens_T].double(), other_TE[tokens_T].double()
        if not torch.allclose(one_TE, other_TE, rtol=0.0, atol=tolerance):
            return name
    return None
