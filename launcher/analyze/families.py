"""Knows where each family of models keeps its routers, and what they return. A new family is one line of `FAMILIES`.

Shape legend: T tokens, M model width, E experts, K choices, X columns of a router's matrix.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.routing.router import Scores


def _softmax(logits_TE: Tensor) -> Tensor:
    return logits_TE.softmax(-1)


def _share_of_sigmoids(logits_TE: Tensor) -> Tensor:
    """DeepSeek-V3's affinities (arXiv 2412.19437, equation 15) have no sum; their shares have one."""
    return Scores.by_sigmoid(logits_TE).probabilities_TE


@dataclass(frozen=True)
class Family:
    """What the analysis knows of one family.

    Attributes:
        router: end of a router's name among the model's modules, below the layer's number.
        probabilities: logits, float32 [T, E], to the distribution over experts that entropy and margin are of. Groups
            and selection biases are no part of it.
    """

    router: str
    probabilities: Callable[[Tensor], Tensor]


FAMILIES = {
    "deepseek_v2": Family("mlp.gate", _softmax),
    "deepseek_v3": Family("mlp.gate", _share_of_sigmoids),
    "gpt_oss": Family("mlp.router", _softmax),
    "mixtral": Family("mlp.gate", _softmax),
    "olmoe": Family("mlp.gate", _softmax),
    "qwen2_moe": Family("mlp.gate", _softmax),
    "qwen3_moe": Family("mlp.gate", _softmax),
}
"""By transformers' ``model_type``. The routers of all of them return (logits [T, E], weights [T, K], ids [T, K])."""


@dataclass(frozen=True)
class RouterModule:
    """The router of one MoE layer.

    Attributes:
        layer: number of the block among all blocks of the model, counted from 0.
        module: what is called once in every forward pass.
    """

    layer: int
    module: nn.Module

    @property
    def top_k(self) -> int:
        """Returns K. Raises CheckpointError if the router does not choose by itself, as those of DeepSeek once did."""
        top_k = getattr(self.module, "top_k", None)
        if not isinstance(top_k, int):
            raise _unknown_router(f"{type(self.module).__name__} does not choose experts")
        return top_k

    @property
    def vectors_EX(self) -> Tensor:
        """The vectors that the hidden state is multiplied with."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()


def find_routers(model: nn.Module, family: Family) -> list[RouterModule]:
    """Returns the routers in the order of their layers. Raises CheckpointError if there is none."""
    pattern = re.compile(rf"(?:.*\.)?layers\.(\d+)\.{re.escape(family.router)}")
    matches = ((pattern.fullmatch(name), module) for name, module in model.named_modules())
    routers = [RouterModule(int(match[1]), module) for match, module in matches if match]
    if not routers:
        raise CheckpointError(
            f"{type(model).__name__} has no router (no module layers.N.{family.router}): all its layers are dense"
        )
    return sorted(routers, key=lambda router: router.layer)


@dataclass(frozen=True)
class Routed:
    """What one router did with the tokens of a forward pass; the experts in the order of their weights.

    Attributes:
        probabilities_TE: distribution over all experts, float32.
        weights_TK, expert_ids_TK: weights and numbers of the experts that the model used.
    """

    probabilities_TE: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor


def read_output(output: Any, family: Family, num_tokens: int) -> Routed:
    """Returns what a router's forward hook sees. Raises CheckpointError if it is not what `FAMILIES` says."""
    if not _is_routing(output, num_tokens):
        raise _unknown_router(f"a router did not return logits, weights and expert ids of {num_tokens} tokens")
    logits_TE, weights_TK, ids_TK = output
    # Some routers leave their choices in no order.
    order_TK = weights_TK.argsort(dim=-1, descending=True, stable=True)
    return Routed(
        family.probabilities(logits_TE.float()), weights_TK.gather(1, order_TK), ids_TK.gather(1, order_TK).long()
    )


def _unknown_router(what: str) -> CheckpointError:
    import transformers

    return CheckpointError(
        f"{what}: transformers {transformers.__version__} is not one that this was made for; "
        "pip install --upgrade 'moe-testbed[checkpoints]'"
    )


def _is_routing(output: Any, num_tokens: int) -> bool:
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(part, Tensor) for part in output):
        return False
    logits_TE, weights_TK, ids_TK = output
    return (
        logits_TE.ndim == weights_TK.ndim == 2
        and ids_TK.shape == weights_TK.shape
        and len(logits_TE) == len(ids_TK) == num_tokens
        and ids_TK.dtype in (torch.int32, torch.int64)
    )
