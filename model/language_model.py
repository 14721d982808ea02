"""The language model: what its parts compute together.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, V token ids, Y MoE layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_testbed.model.architecture import Architecture
from moe_testbed.model.config import ENCODER
from moe_testbed.model.output_layer import target_loss, token_loss
from moe_testbed.model.stack import LayerRouting, seen
from moe_testbed.model.transformer import Memory
from moe_testbed.routing.records import RoutingContext


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        loss: mean cross-entropy plus the balancers' losses (training mode only), scalar.
        cross_entropy: the mean cross-entropy in it, scalar.
        cross_entropy_BL: nats per token, float32; 0 where there is no target.
        correct_BL: the target has the highest logit, bool; False where there is none.
        layers: routing of each MoE layer, those of the encoder first.
        balance: value of each balancer's loss before its coefficient; empty in evaluation.
    """

    loss: Tensor
    cross_entropy: Tensor
    cross_entropy_BL: Tensor
    correct_BL: Tensor
    layers: list[LayerRouting]
    balance: dict[str, Tensor]


class LanguageModel(Architecture):
    """Predicts tokens: of the text that follows, of places that are hidden, or of a text that an encoder has read. The
    arguments are those of :class:`~moe_testbed.model.architecture.Architecture`."""

    def forward(self, context: RoutingContext, targets_BL: Tensor) -> ModelOutput:
        """Computes the loss of one micro-batch: the mean over its targets or, where there are not as many as tokens,
        the mean over the sequences of the mean over a sequence's targets.

        Args:
            context: token ids that the last stack reads, and what routers may know of them; with an encoder in front,
                the same of the text that this reads.
            targets_BL: token ids that are to be predicted, int64; ``NO_TARGET`` where there is none.

        Raises:
            ValueError: the router needs domain labels and a token has none.
            RouterError: what a router returned is no routing decision.
        """
        hidden_BLM, layers = self._run_stacks(context)
        cross_entropy, cross_entropy_BL, correct_BL = self._predict(hidden_BLM, context, targets_BL)
        all_layers = [layer for of_stack in layers.values() for layer in of_stack]
        loss = cross_entropy
        if not self.training:
            return ModelOutput(loss, cross_entropy, cross_entropy_BL, correct_BL, all_layers, {})
        values: dict[str, Tensor] = {}
        of_stacks = self._contexts(context)
        for name, stack in self._stacks.items():
            terms = None if name in self.frozen else stack.balance(layers[name], of_stacks[name])
            if terms is not None:
                loss = loss + terms.loss
                prefix = "" if len(self._stacks) == 1 else f"{name}/"
                values |= {f"{prefix}{label}": value for label, value in terms.values.items()}
        return ModelOutput(loss, cross_entropy, cross_entropy_BL, correct_BL, all_layers, values)

    def _predict(
        self, hidden_BLM: Tensor, context: RoutingContext, targets_BL: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, cross-entropy [B, L] and whether the target comes first [B, L]."""
        if self._output_ids is not None:
            return target_loss(hidden_BLM, self._output_weight(), targets_BL, context.valid_BL)
        shares_T = None if context.valid_T is None else context.valid_T / context.valid_T.sum().clamp(min=1)
        hidden_TM, weight_VM = hidden_BLM.flatten(0, 1), self._output_weight()
        loss, cross_entropy_T, correct_T = token_loss(hidden_TM, weight_VM, targets_BL.flatten(), shares_T)
        return loss, cross_entropy_T.view_as(targets_BL), correct_T.view_as(targets_BL)

    def _run_stacks(self, context: RoutingContext) -> tuple[Tensor, dict[str, list[LayerRouting]]]:
        """Output of the last stack, [B, L, M], and what each MoE layer of each stack did."""
        layers: dict[str, list[LayerRouting]] = {}
        memory: Memory | None = None
        hidden_BLM = torch.empty(0)
        for name, of_stack in self._contexts(context).items():
            with torch.no_grad() if name in self.frozen else contextlib.nullcontext():
                x_BLM = self._embed(name, of_stack.token_ids_BL)
                hidden_BLM, layers[name] = self._stacks[name](x_BLM, of_stack, memory)
            memory = Memory(hidden_BLM, seen(of_stack))
        return hidden_BLM, layers

    def _contexts(self, context: RoutingContext) -> dict[str, RoutingContext]:
        """The context of every stack, by name. What is barred is told of the MoE layers of all of them together."""
        contexts = dict.fromkeys(self._stacks, context)
        if context.encoder is not None:
            contexts[ENCODER] = context.encoder
        if context.barred_YBE is None:
            return contexts
        sizes = [len(stack.moe_layers()) for stack in self._stacks.values()]
        barred = context.barred_YBE.split(sizes)
        return {
            name: replace(of_stack, barred_YBE=barred_YBE)
            for (name, of_stack), barred_YBE in zip(contexts.items(), barred, strict=True)
        }

    def logits(self, context: RoutingContext) -> Tensor:
        """Returns the logits of the ids that can be a target at every place, [B, L, V]."""
        return self._run_stacks(context)[0] @ self._output_weight().t()

    @torch.no_grad()
    def begin_step(self, contexts: Iterable[RoutingContext]) -> None:
        """Routes all micro-batches of this rank's step ahead, and tells the balancers how the whole step will be
        loaded."""
        moving = self._moving()
        routed = ((self._run_stacks(context)[1], self._contexts(context)) for context in contexts)
        kept = routed if len(moving) == 1 else list(routed)
        for stack in moving:
            stack.begin_step((layers[stack.name], of_stacks[stack.name]) for layers, of_stacks in kept)
