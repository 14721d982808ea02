"""A stack: a row of transformer blocks with the routers of its experts and what keeps their load even.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, E experts, K choices, Y MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_testbed.model.config import ModelConfig
from moe_testbed.model.initialisation import seed_of
from moe_testbed.model.moe import MoELayer
from moe_testbed.model.transformer import Attention, CrossAttention, FeedForward, Memory, RMSNorm, RotaryPositions
from moe_testbed.routing.balance.balancing import BalanceTerms, Balancing
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.layer import LayerRouter, make_layer_router, without_barred
from moe_testbed.routing.records import UNLABELLED, LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router


@dataclass(frozen=True)
class LayerRouting:
    """What one MoE layer did with the tokens of a micro-batch.

    Attributes:
        context: what is known of these tokens.
        decision: the router's.
        kept_TK: assignments that reached their expert, bool; all of them without a capacity.
        outputs_TKM: what each token's experts returned, weighted; None unless a balancer needs it.
    """

    context: RoutingContext
    decision: RoutingDecision
    kept_TK: Tensor
    outputs_TKM: Tensor | None = None


@dataclass(frozen=True)
class StackSetting:
    """What a stack is built for, besides its config.

    Attributes:
        causal: a token sees those before it alone.
        has_memory: its blocks attend to an encoder.
        setting_of_layer: what the router of each MoE layer, counted from 0 in this stack, is built for.
        sequence_length: longest L.
        seed: that of the model, and ``seed_prefix`` what keeps the routers of several stacks apart.
        expert_parallel_size: ranks over which the experts are spread.
        data_parallel_group: ranks over which the batch is spread; None for one process.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        moe_layer: class of the MoE layers.
    """

    name: str
    causal: bool
    has_memory: bool
    setting_of_layer: Callable[[int], RouterSetting]
    sequence_length: int
    seed: int
    seed_prefix: str
    expert_parallel_size: int
    data_parallel_group: dist.ProcessGroup | None
    activation_checkpointing: bool
    moe_layer: type[MoELayer]


class Block(nn.Module):
    """Attention, in a decoder with an encoder attention to that, then a dense layer or experts.

    Args:
        layer: number of the block, counted from 0.
        routing: what decides for the block's experts; None in a dense block, and in one that follows the decision of
            an earlier block.
        keep_outputs: the experts' outputs are returned one by one, too.
    """

    def __init__(
        self, config: ModelConfig, setting: StackSetting, layer: int, routing: LayerRouter | None, keep_outputs: bool
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config.hidden_size, config.num_heads, setting.causal)
        self.cross_attention: CrossAttention | None = None
        if setting.has_memory:
            self.cross_attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
            self.cross_attention = CrossAttention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.routing = routing
        self.shared: FeedForward | None = None
        self.moe: MoELayer | None = None
        if not config.is_moe_layer(layer):
            self.dense = FeedForward(config.hidden_size, config.dense_size(layer))
            return
        self.moe = setting.moe_layer(config.hidden_size, config.moe, setting.expert_parallel_size, keep_outputs)
        if config.moe.num_shared_experts:
            self.shared = FeedForward(config.hidden_size, config.moe.num_shared_experts * config.moe.expert_size)

    def forward(
        self,
        x_BLM: Tensor,
        positions: RotaryPositions,
        context: RoutingContext,
        decision: RoutingDecision | None,
        seen_B11L: Tensor | None = None,
        memory: Memory | None = None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """Output, [B, L, M], and what the experts did.

        Args:
            decision: of an earlier block, for a block without a router of its own.
            seen_B11L: see :class:`~moe_testbed.model.transformer.Attention`.
            memory: what an encoder has made of its text, for a block that attends to one.
        """
        x_BLM = x_BLM + self.attention(self.attention_norm(x_BLM), positions, seen_B11L)
        if self.cross_attention is not None:
            assert memory is not None, "a decoder with cross-attention needs what the encoder returned"
            x_BLM = x_BLM + self.cross_attention(self.cross_attention_norm(x_BLM), memory, positions)
        normed_BLM = self.feed_forward_norm(x_BLM)
        if self.moe is None:
            return x_BLM + self.dense(normed_BLM), None
        if self.routing is not None:
            decision = self.routing(normed_BLM.flatten(0, 1), context)
        assert decision is not None, "the first MoE layer decides"
        if (barred_TE := context.barred_TE) is not None:
            decision = without_barred(decision, barred_TE)
        output = self.moe(normed_BLM, decision)
        y_BLM = output.hidden_BLM if self.shared is None else output.hidden_BLM + self.shared(normed_BLM)
        return x_BLM + y_BLM, LayerRouting(context, decision, output.kept_TK, output.outputs_TKM)


class Stack(nn.Module):
    """Pre-norm transformer blocks, a final norm, and MoE in every n-th block, with balancing of its own.

    Args:
        config: sizes of this stack, see :meth:`~moe_testbed.model.config.ModelConfig.of_stack`.
        routing: its router and balancers.
        setting: the rest.
    """

    def __init__(self, config: ModelConfig, routing: RoutingConfig, setting: StackSetting) -> None:
        super().__init__()
        self.name, self.config = setting.name, config
        self.activation_checkpointing = setting.activation_checkpointing
        self.needs_domains = config.num_moe_layers > 0 and routing.needs_domains
        self.positions = RotaryPositions(
            config.num_heads, config.hidden_size // config.num_heads, setting.sequence_length, config.rope_theta
        )
        self.blocks = nn.ModuleList()
        keep_outputs = any(balancer.needs_outputs for balancer in routing.balance.values())
        deciding = 0
        for layer in range(config.num_layers):
            decides = config.is_moe_layer(layer) and (deciding == 0 or routing.depth == "layer_wise")
            part = None
            if decides:
                # A router draws its own start; the draw must not depend on what was built before it.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed_of(setting.seed, f"{setting.seed_prefix}router.{deciding}"))
                    part = make_layer_router(routing, setting.setting_of_layer(deciding))
                deciding += 1
            self.blocks.append(Block(config, setting, layer, part, keep_outputs))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.balancing: Balancing | None = None
        if deciding:
            moe = config.moe
            self.balancing = Balancing(
                routing.balance, deciding, moe.num_routed_experts, moe.choices, setting.data_parallel_group
            )

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def forward(
        self, x_BLM: Tensor, context: RoutingContext, memory: Memory | None = None
    ) -> tuple[Tensor, list[LayerRouting]]:
        """Returns hidden states after the final norm, [B, L, M], and what each MoE layer did.

        Raises:
            ValueError: the router needs domain labels and a token has none.
        """
        if self.needs_domains and bool((context.domain_BL == UNLABELLED).any()):
            raise ValueError("the router needs a domain label for every token, but the mix has unlabelled documents")
        if self.balancing is not None:
            context = replace(context, selection_bias_YE=self.balancing.selection_bias_YE())
        seen_B11L = seen(context)
        layers: list[LayerRouting] = []
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            decision = layers[-1].decision if layers else None
            inputs = x_BLM, self.positions, context.at_layer(len(layers)), decision, seen_B11L, memory
            x_BLM, routing = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if routing is not None:
                layers.append(routing)
        return self.final_norm(x_BLM), layers

    def balance(self, layers: list[LayerRouting], context: RoutingContext) -> BalanceTerms | None:
        """Returns the balancers' losses of one training micro-batch; None where there is nothing to balance."""
        if self.balancing is None:
            return None
        decisions = self.decisions(layers)
        outputs_TKM = [layer.outputs_TKM for layer in layers if layer.outputs_TKM is not None]
        terms = self.balancing(decisions, context, outputs_TKM)
        for y, (router, decision) in enumerate(zip(self.routers(), decisions, strict=True)):
            router.observe(decision, context.at_layer(y))
        return terms

    def decisions(self, layers: list[LayerRouting]) -> list[RoutingDecision]:
        """Returns the decisions that were made, without those that were reused."""
        return [layer.decision for layer in layers[: len(self.routers())]]

    def begin_step(self, routed: Iterable[tuple[list[LayerRouting], RoutingContext]]) -> None:
        """Tells the balancers how the whole step will be loaded.

        Args:
            routed: what the layers did ahead with each micro-batch of this rank's step.
        """
        if self.balancing is not None:
            self.balancing.begin_step((self.decisions(layers), context.valid_T) for layers, context in routed)

    def finish_step(self) -> None:
        """Tells balancers and routers that an optimizer step is complete."""
        if self.balancing is None:
            return
        totals = self.balancing.finish_step()
        for router, counts_E in zip(self.routers(), totals.counts_YE, strict=True):
            router.finish_step(LayerStep(counts_E, totals.tokens, self.balancing.mean_over_ranks))

    def routers(self) -> list[Router]:
        """Returns the routers of the layers that decide, in order."""
        return [block.routing.router for block in self.blocks if isinstance(block.routing, LayerRouter)]

    def moe_layers(self) -> list[MoELayer]:
        """Returns the MoE layers, in order."""
        return [block.moe for block in self.blocks if isinstance(block.moe, MoELayer)]


def seen(context: RoutingContext) -> Tensor | None:
    """Returns which places attention may look at, bool [B, 1, 1, L]; None where there is no padding.

    A sequence that is padding as a whole, as one that is run again, sees itself: attention to nothing is no number.
    """
    if context.valid_BL is None:
        return None
    empty_B1 = ~context.valid_BL.any(1, keepdim=True)
    return (context.valid_BL | empty_B1)[:, None, None]
