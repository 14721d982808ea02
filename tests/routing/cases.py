"""The small problem on which all routers are tried: four domains of unequal weight, and packed sequences."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_testbed.routing import routers
from moe_testbed.routing.load import count_assignments
from moe_testbed.routing.records import LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Router
from tests.routing import oracles_learned, oracles_pool
from tests.routing.oracles import ORACLES

# Importing them registers routers and oracles.
assert routers.__all__ and oracles_learned and oracles_pool

DOMAINS = ("prose", "code", "law", "music")
DOMAIN_WEIGHTS = (0.4, 0.3, 0.2, 0.1)
HIDDEN, VOCABULARY, SEQUENCES, LENGTH, LAYER = 6, 50, 3, 4, 1

Case = tuple[str, dict[str, Any]]


def cases(names: list[str] | None = None) -> list[Case]:
    """(router, options) of every registered router, with the options that its oracle lists."""
    return [
        (name, options)
        for name in names or ROUTERS.names()
        for options in (ORACLES[name].options if name in ORACLES else [{}])
    ]


def cases_by_top_k(*sizes: int) -> list[tuple[Case, int]]:
    """Every case with every K, but for those that are refused: see `test_one_normalised_weight_is_refused`."""
    return [(case, top_k) for case in cases() for top_k in sizes if not (top_k == 1 and weight_would_be_one(case))]


def weight_would_be_one(case: Case) -> bool:
    """With one choice the weight is 1 whatever the router's scores, so that the router would learn nothing."""
    return case[0] == "top_k_softmax" or case[1].get("normalise") is True


def case_id(case: Case | int) -> str:
    """For test names; a K stands for itself."""
    if isinstance(case, int):
        return str(case)
    name, options = case
    return "-".join([name, *(f"{option}={value}" for option, value in options.items())])


def make_setting(top_k: int = 2, num_experts: int = 24, layer: int = LAYER, seed: int = 7) -> RouterSetting:
    counts_DV = torch.randint(1, 1000, (len(DOMAINS), VOCABULARY), generator=torch.Generator().manual_seed(3))
    return RouterSetting(num_experts, top_k, HIDDEN, layer, seed, DOMAINS, DOMAIN_WEIGHTS, counts_DV)


def make_router(case: Case, top_k: int = 2, **setting: int) -> Router:
    """A router whose scores are well apart, so that a choice never hangs on rounding."""
    name, options = case
    # With inside: all every domain's group holds exactly K experts.
    setting.setdefault("num_experts", len(DOMAINS) * top_k if options.get("inside") == "all" else 24)
    cls = ROUTERS.get(name)
    router = cls(cls.Config(name=name, **options), make_setting(top_k, **setting))
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def make_context(sequences: int = SEQUENCES, length: int = LENGTH, seed: int = 5) -> RoutingContext:
    """Packed sequences: the domain changes inside them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    domain_BL = draw(len(DOMAINS), sequences, 2).repeat_interleave(length // 2, dim=1)
    return RoutingContext(
        token_ids_BL=draw(VOCABULARY, sequences, length),
        domain_BL=domain_BL,
        document_BL=domain_BL + 10 * torch.arange(sequences)[:, None],
        position_BL=torch.arange(length).expand(sequences, length),
        sequence_B=100 + 3 * torch.arange(sequences),
        step=2,
        layer=LAYER,
    )


def single_domain_context(sequences: int, length: int = 2) -> RoutingContext:
    """Sequence b is wholly of domain b mod D."""
    context = make_context(sequences, length)
    domain_B = torch.arange(sequences) % len(DOMAINS)
    return replace(context, domain_BL=domain_B[:, None].expand(sequences, length), sequence_B=torch.arange(sequences))


def run_step(router: Router, micro_batches: list[tuple[Tensor, RoutingContext]]) -> LayerStep:
    """One optimizer step of a router in training, in one process."""
    counts_E, tokens = torch.zeros(router.setting.num_experts, dtype=torch.int64), torch.tensor(0)
    for x_TM, context in micro_batches:
        decision = router(x_TM, context)
        router.observe(decision, context)
        counts_E += count_assignments(decision.expert_ids_TK, len(counts_E), context.valid_T)
        tokens += len(x_TM) if context.valid_T is None else context.valid_T.sum()
    step = LayerStep(counts_E, tokens, lambda values: values)
    router.finish_step(step)
    return step


def run_steps(router: Router, steps: int, sequences: int = 8, length: int = 8) -> list[LayerStep]:
    """Optimizer steps of two micro-batches each, of random tokens; the router is left in the mode it was in."""
    training = router.training
    router.train()
    done = []
    for step in range(steps):
        contexts = [make_context(sequences, length, seed=100 * step + part) for part in range(2)]
        done.append(
            run_step(router, [(hidden_states(c, seed=100 * step + part), c) for part, c in enumerate(contexts)])
        )
    router.train(training)
    return done


def rows(context: RoutingContext, chosen: slice) -> RoutingContext:
    """The context of some of the sequences."""
    return replace(
        context,
        token_ids_BL=context.token_ids_BL[chosen],
        domain_BL=context.domain_BL[chosen],
        document_BL=context.document_BL[chosen],
        position_BL=context.position_BL[chosen],
        sequence_B=context.sequence_B[chosen],
    )


def hidden_states(context: RoutingContext, dtype: torch.dtype = torch.float32, seed: int = 11) -> Tensor:
    T = context.token_ids_BL.numel()
    return torch.randn(T, HIDDEN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same_decision(actual: RoutingDecision, expected: RoutingDecision) -> bool:
    """The same experts and weights, bit for bit."""
    same_experts = torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    return same_experts and torch.equal(actual.weights_TK, expected.weights_TK)


def assert_same_decision(actual: RoutingDecision, expected: RoutingDecision) -> None:
    """The same experts and the same numbers, bit for bit."""
    assert torch.equal(actual.expert_ids_TK, expected.expert_ids_TK)
    for name in ("weights_TK", "probabilities_TE", "logits_TE"):
        a, b = getattr(actual, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
