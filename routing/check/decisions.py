"""What a single decision looks like: form, values, and what its router says that it provides.

Shape legend: T tokens, E experts, K choices, X columns of the vectors that
stand for experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moe_testbed.routing.check.trial import (
    LAYER,
    ROUNDING,
    B,
    L,
    Trial,
    decisions,
    difference,
    hidden_states,
    make_context,
    spread,
)
from moe_testbed.routing.check.violation import Violation
from moe_testbed.routing.errors import RouterError
from moe_testbed.routing.guard import check_decision
from moe_testbed.routing.records import RoutingDecision
from moe_testbed.routing.router import Capability


def config_is_kept(trial: Trial) -> str:
    written = trial.config.model_dump(mode="json")
    if type(trial.config).model_validate(written) != trial.config:
        raise Violation("its config, written as JSON and read again, is another; a run could not continue")
    return "written and read again it is the same"


def decision_is_one(trial: Trial) -> str:
    for mode, decision in decisions(trial).items():
        try:
            check_decision(decision, trial.setting.num_experts, trial.setting.top_k, B * L, trial.config, LAYER, 0)
        except RouterError as error:
            raise Violation(f"in {mode}: {error}") from None
    form = "tokens may use more or fewer experts, as it says" if trial.config.varying_top_k else "shapes and dtypes fit"
    return f"{form}, experts in range, weights finite"


def experts_differ(trial: Trial) -> str:
    for mode, decision in decisions(trial).items():
        times_TE, _ = spread(decision, trial.setting.num_experts)
        if int(times_TE.max()) > 1:
            token = int(times_TE.amax(1).argmax())
            raise Violation(f"in {mode} token {token} uses an expert twice: {decision.expert_ids_TK[token].tolist()}")
    return "no token uses an expert twice"


def probabilities_are_some(trial: Trial) -> str:
    if Capability.SCORES not in trial.config.provides:
        return "none, as it says: it cannot be balanced by a loss"
    for mode, decision in decisions(trial).items():
        assert decision.probabilities_TE is not None, "check_decision has looked"
        probabilities_TE = decision.probabilities_TE.detach()
        if float(probabilities_TE.min()) < 0:
            raise Violation(f"in {mode} a probability is {float(probabilities_TE.min()):.3g}, below 0")
        off_T = (probabilities_TE.sum(-1) - 1).abs()
        if float(off_T.max()) > ROUNDING:
            token = int(off_T.argmax())
            raise Violation(
                f"in {mode} the probabilities of token {token} sum to {float(probabilities_TE[token].sum()):.6g}, not 1"
            )
    return "not below 0, and each token's sum to 1"


def provides_what_it_says(trial: Trial) -> str:
    provides, E = trial.config.provides, trial.setting.num_experts
    by_mode = decisions(trial)
    training = by_mode["training"]
    if Capability.VECTORS in provides and (training.vectors_EX is None or len(training.vectors_EX) != E):
        raise Violation("says that it has a vector per expert, but vectors_EX() does not return one row for each")
    if Capability.NOISE in provides and training.noise is None:
        raise Violation("says that its scores are noisy, but the decision in training carries no noise")
    if by_mode["evaluation"].noise is not None:
        raise Violation("its decision in evaluation carries noise; draw none unless self.training")
    if Capability.RELU_GATES in provides:
        assert training.logits_TE is not None, "RELU_GATES without SCORES"
        gates_TE = torch.where(spread(training, E)[0] > 0, training.logits_TE.relu(), 0.0)
        if not torch.allclose(spread(training, E)[1], gates_TE, atol=ROUNDING):
            raise Violation("says that its weights are the positive part of its logits, but they are not")
    if Capability.SELECTION_BIAS in provides:
        _bias_moves_the_choice(trial, training)
    return ", ".join(sorted(capability.value for capability in provides)) or "nothing, as it says"


def _bias_moves_the_choice(trial: Trial, without: RoutingDecision) -> None:
    E, context = trial.setting.num_experts, make_context()
    x_TM = hidden_states(context)

    def used_T(bias_YE: Tensor, expert: int) -> tuple[RoutingDecision, Tensor]:
        biased = replace(context, selection_bias_YE=bias_YE)
        decision: RoutingDecision = trial.router(training=True)(x_TM, biased)
        return decision, spread(decision, E)[0][:, expert]

    zero_YE = torch.zeros(LAYER + 1, E)
    if found := difference(used_T(zero_YE, 0)[0], without, E):
        raise Violation(f"a selection bias of zero changes the {found}")
    moved = 0
    for expert in range(E):
        preferred_YE = zero_YE.clone()
        preferred_YE[LAYER, expert] = 100.0
        before_T, (_, after_T) = spread(without, E)[0][:, expert], used_T(preferred_YE, expert)
        if (after_T < before_T).any():
            raise Violation(f"a selection bias of +100 for expert {expert} takes tokens away from it")
        moved += int(after_T.sum() - before_T.sum())
    if not moved:
        raise Violation(
            "says that its selection takes a bias, but context.bias_E changes nothing; add it to the scores that "
            "select compares"
        )
