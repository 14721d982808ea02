"""What a route may depend on: not on later tokens, nor on other sequences, nor on padding.

Shape legend: B sequences, L positions, T = B * L tokens, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moe_testbed.routing.check.trial import (
    ROUNDING,
    B,
    L,
    Trial,
    changed_where,
    decisions,
    difference,
    hidden_states,
    make_context,
    part_of,
)
from moe_testbed.routing.check.violation import Violation
from moe_testbed.routing.load import count_assignments
from moe_testbed.routing.records import UNLABELLED, LayerStep, RoutingDecision


def is_causal(trial: Trial) -> str:
    context, E = make_context(), trial.setting.num_experts
    x_TM, router = hidden_states(context), trial.router()
    before = router(x_TM, context)
    for position in range(1, L):
        later_BL = (torch.arange(L) >= position).expand(B, L)
        later_T = later_BL.reshape(-1)
        for factor in (-1.0, 3.0):
            x_later_TM = torch.where(later_T[:, None], factor * x_TM, x_TM)
            after = router(x_later_TM, changed_where(context, later_BL))
            found = difference(before, after, E, ~later_T, ROUNDING, scores=False)
            if found and trial.config.causal:
                raise Violation(
                    f"when the tokens from position {position} on change, the {found} of earlier tokens change: they "
                    "know the future. Decide from earlier tokens only, or let causal of its Config be False"
                )
            if found:
                return f"not causal, as it says: the {found} of a token depend on later tokens"
    if not trial.config.causal:
        return "says that it is not causal, though no dependence on later tokens was found"
    return "no token's experts or weights change when later tokens change"


def reads_labels_only_if_it_says(trial: Trial) -> str:
    if trial.config.needs_domains:
        return "reads domain labels, as it says"
    context = make_context()
    unlabelled = replace(context, domain_BL=torch.full_like(context.domain_BL, UNLABELLED))
    labelled = decisions(trial, context)
    for mode, decision in decisions(trial, unlabelled).items():
        if found := difference(labelled[mode], decision, trial.setting.num_experts):
            raise Violation(
                f"without domain labels its {found} change in {mode}; let needs_domains of its Config be True"
            )
    return "decides without domain labels"


def does_not_depend_on_the_split(trial: Trial) -> str:
    context, router = make_context(), trial.router()
    x_TM = hidden_states(context)
    whole = router(x_TM, context)
    for size in (1, 2):
        for first in range(0, B, size):
            tokens = slice(first * L, (first + size) * L)
            part = router(x_TM[tokens], part_of(context, slice(first, first + size)))
            expected = RoutingDecision(whole.expert_ids_TK[tokens], whole.weights_TK[tokens])
            found = difference(expected, part, trial.setting.num_experts, tolerance=ROUNDING, scores=False)
            if found and trial.config.causal:
                raise Violation(
                    f"in evaluation the {found} of a sequence change when it is routed with {size - 1} others instead "
                    f"of {B - 1}. Decide for each sequence by itself, or let causal of its Config be False"
                )
            if found:
                return "routes depend on the other sequences, as a router that is not causal may"
    return "in evaluation sequences are routed alike, alone and together"


def ignores_padding(trial: Trial) -> str:
    context, E = make_context(), trial.setting.num_experts
    length_B1 = torch.tensor([L, L - 1, L - 3, L - 2])[:, None]
    valid_BL = torch.arange(L) < length_B1
    context = replace(context, valid_BL=valid_BL)
    x_TM, valid_T = hidden_states(context), valid_BL.reshape(-1)
    other_TM = torch.where(valid_T[:, None], x_TM, 5.0 * x_TM.flip(0))
    other = changed_where(context, ~valid_BL)
    for training in (False, True):
        one, two = trial.router(training), trial.router(training)
        decision, changed = one(x_TM, context), two(other_TM, other)
        mode = "training" if training else "evaluation"
        if found := difference(decision, changed, E, valid_T, ROUNDING, scores=False):
            raise Violation(f"in {mode} the {found} of tokens change with what stands in the padding")
    for router, routed, at in ((one, decision, context), (two, changed, other)):
        router.observe(routed, at)
        counts_E = count_assignments(routed.expert_ids_TK, E, at.valid_T)
        router.finish_step(LayerStep(counts_E, valid_T.sum(), lambda value: value))
    state = dict(two.named_buffers())
    for name, buffer in one.named_buffers():
        if not torch.allclose(buffer.double(), state[name].double(), rtol=0.0, atol=ROUNDING):
            raise Violation(f"its buffer '{name}' depends on what stands in the padding; use context.valid_T")
    return "what stands in it changes no token's route and no statistics"
