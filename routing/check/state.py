"""When a router may change: at the end of an optimizer step, and in what its state_dict holds.

Shape legend: B sequences, L positions, E experts.
"""

from __future__ import annotations

import io

import torch

from moe_testbed.routing.check.trial import (
    LAYER,
    B,
    L,
    Trial,
    difference,
    hidden_states,
    make_context,
    observe_step,
)
from moe_testbed.routing.check.violation import Violation
from moe_testbed.routing.guard import check_decision


def is_deterministic(trial: Trial) -> str:
    context = make_context()
    x_TM = hidden_states(context)
    for training in (True, False):
        mode, router = "training" if training else "evaluation", trial.router(training)
        buffers = {name: buffer.clone() for name, buffer in router.named_buffers()}
        torch.manual_seed(1)
        drawn = torch.get_rng_state()
        first = router(x_TM, context)
        if not torch.equal(torch.get_rng_state(), drawn):
            raise Violation(
                f"draws from torch's generator in {mode}; draw with "
                "moe_testbed.routing.routers.parts.hashing.uniform_from_keys, so that recomputation and a restart "
                "repeat it"
            )
        changed = [name for name, buffer in router.named_buffers() if not torch.equal(buffer, buffers[name])]
        if changed:
            raise Violation(
                f"changes its buffer '{changed[0]}' while it decides in {mode}; gather in observe, change in "
                "finish_step"
            )
        if found := difference(first, router(x_TM, context), trial.setting.num_experts):
            raise Violation(f"the same input gives other {found} the second time, in {mode}")
    return "the same input gives the same decision, and torch's generator is left alone"


def routes_alike_within_a_step(trial: Trial) -> str:
    context, E = make_context(), trial.setting.num_experts
    x_TM, router = hidden_states(context), trial.router(training=True)
    for seed in (20, 30, 40):
        before = router(x_TM, context)
        step = observe_step(router, trial, seed)
        if found := difference(before, router(x_TM, context), E):
            raise Violation(
                f"after observe() the {found} of the same tokens are others within the same optimizer step; gather in "
                "observe, change in finish_step"
            )
        router.finish_step(step)
        for mode in (True, False):
            decision = router.train(mode)(x_TM, context)
            check_decision(decision, E, trial.setting.top_k, B * L, trial.config, LAYER, 0)
        router.train()
    return "routes stay the same within an optimizer step; load counts are taken at its end"


def state_is_kept(trial: Trial) -> str:
    context, E = make_context(), trial.setting.num_experts
    x_TM, original, restored = hidden_states(context), trial.router(training=True), trial.router(True, seed=2)
    for seed in (50, 60):
        original.finish_step(observe_step(original, trial, seed))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    if found := difference(original(x_TM, context), restored(x_TM, context), E):
        raise Violation(
            f"restored from its state_dict it chooses other {found}; keep what it needs in parameters and buffers"
        )
    for router in (original, restored):
        router.finish_step(observe_step(router, trial, 70))
    if found := difference(original(x_TM, context), restored(x_TM, context), E):
        raise Violation(
            f"restored from its state_dict and trained for one more step it chooses other {found}; keep state in "
            "buffers, and set what observe gathers back to zero in finish_step"
        )
    return "saved and restored it decides the same bit for bit, also one step later"
