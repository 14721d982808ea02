"""In which precision, and on which device, a router decides."""

from __future__ import annotations

import contextlib
from unittest import mock

import torch
from torch import Tensor

from moe_testbed.routing.check.trial import ROUNDING, B, Trial, difference, hidden_states, make_context, on_device
from moe_testbed.routing.check.violation import Violation, told
from moe_testbed.routing.records import RoutingDecision

_ON_CPU_ONLY = "reads values on the host; without a GPU it could be tried on the CPU only"


def decides_in_float32(trial: Trial) -> str:
    context, E = make_context(10 * B), trial.setting.num_experts
    low_TM = hidden_states(context).bfloat16()
    for mode in ("with bfloat16 parameters", "under autocast"):
        router, exact = trial.router(), trial.router()
        if mode == "under autocast":
            with torch.autocast("cpu", torch.bfloat16):
                actual = router(low_TM, context)
        else:
            exact.load_state_dict({name: _rounded(value) for name, value in exact.state_dict().items()})
            actual = router.bfloat16()(low_TM, context)
        for name in ("weights_TK", "probabilities_TE", "logits_TE"):
            value = getattr(actual, name)
            if value is not None and value.dtype != torch.float32:
                raise Violation(
                    f"{name} is {value.dtype} {mode}, where near ties are decided by rounding; compute scores in "
                    "float32, as moe_testbed.routing.learned.LinearScore does"
                )
        if found := difference(actual, exact(low_TM.float(), context), E, tolerance=ROUNDING):
            raise Violation(f"the {found} {mode} are not those of float32; compute scores in float32")
    return "bfloat16 inputs, parameters and autocast give the decision of float32"


def _rounded(value: Tensor) -> Tensor:
    return value.bfloat16().to(value.dtype) if value.is_floating_point() else value


def stays_on_its_device(trial: Trial) -> str:
    context = make_context()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        decision = trial.router().to(device)(hidden_states(context).to(device), on_device(context, device))
        _on(device, decision)
        host = RoutingDecision(decision.expert_ids_TK.cpu(), decision.weights_TK.cpu())
        expected = trial.router()(hidden_states(context), context)
        if found := difference(host, expected, trial.setting.num_experts, tolerance=1e-3, scores=False):
            raise Violation(f"the {found} on the GPU are not those on the CPU")
        return "the GPU decides like the CPU"
    device = torch.device("meta")
    try:
        # Autocast knows no meta device; without numbers there is no precision either.
        with mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()):
            decision = trial.router().to(device)(hidden_states(context).to(device), on_device(context, device))
    except NotImplementedError:
        return _ON_CPU_ONLY
    except RuntimeError as error:
        if "device" in str(error):
            raise Violation(f"mixes devices: {told(error)}; create tensors with device=x_TM.device") from None
        return _ON_CPU_ONLY
    _on(device, decision)
    return "creates no tensor on another device than that of its input"


def _on(device: torch.device, decision: RoutingDecision) -> None:
    for name in ("expert_ids_TK", "weights_TK", "probabilities_TE", "logits_TE"):
        value = getattr(decision, name)
        if value is not None and value.device.type != device.type:
            raise Violation(f"{name} is on {value.device} for inputs on {device}; create it with device=x_TM.device")
