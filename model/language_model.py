"""The decoder-only language model.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, V token ids, E experts, K choices, Y MoE
layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_testbed.model.config import ModelConfig
from moe_testbed.model.initialisation import initialise, seed_of
from moe_testbed.model.moe import MoELayer
from moe_testbed.model.output_layer import next_token_loss
from moe_testbed.model.refusals import refuse_expert_names, refuse_scalars
from moe_testbed.model.transformer import Attention, FeedForward, RMSNorm, RotaryPositions
from moe_testbed.routing.balance.balancing import Balancing
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.layer import LayerRouter, make_layer_router, without_barred
from moe_testbed.routing.records import UNLABELLED, LayerStep, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import Router


@dataclass(frozen=True)
class LayerRouting:
    """What one MoE layer did with the tokens of a micro-batch.

    Attributes:
        decision: the router's.
        kept_TK: assignments that reached their expert, bool; all of them without a capacity.
        outputs_TKM: what each token's experts returned, weighted; None unless a balancer needs it.
    """

    decision: RoutingDecision
    kept_TK: Tensor
    outputs_TKM: Tensor | None = None


@dataclass(frozen=True)
class ModelOutput:
    """Result of a forward pass.

    Attributes:
        loss: mean cross-entropy plus the balancers' losses (training mode only), scalar.
        cross_entropy_BL: nats per token, float32.
        layers: routing of each MoE layer.
        balance: value of each balancer's loss before its coefficient; empty in evaluation.
    """

    loss: Tensor
    cross_entropy_BL: Tensor
    layers: list[LayerRouting]
    balance: dict[str, Tensor]


class Block(nn.Module):
    """Attention, then a dense layer or experts.

    Args:
        layer: number of the block, counted from 0.
        routing: what decides for the block's experts; None in a dense block, and in one that follows the decision of
            an earlier block.
        keep_outputs: the experts' outputs are returned one by one, too.
        moe_layer: class of the block's MoE layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        routing: LayerRouter | None,
        expert_parallel_size: int,
        keep_outputs: bool,
        moe_layer: type[MoELayer],
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.routing = routing
        self.shared: FeedForward | None = None
        self.moe: MoELayer | None = None
        if not config.is_moe_layer(layer):
            self.dense = FeedForward(config.hidden_size, config.dense_size(layer))
            return
        self.moe = moe_layer(config.hidden_size, config.moe, expert_parallel_size, keep_outputs)
        if config.moe.num_shared_experts:
            self.shared = FeedForward(config.hidden_size, config.moe.num_shared_experts * config.moe.expert_size)

    def forward(
        self,
        x_BLM: Tensor,
        positions: RotaryPositions,
        context: RoutingContext,
        decision: RoutingDecision | None,
    ) -> tuple[Tensor, LayerRouting | None]:
        """Output, [B, L, M], and what the experts did.

        Args:
            decision: of an earlier block, for a block without a router of its own.
        """
        x_BLM = x_BLM + self.attention(self.attention_norm(x_BLM), positions)
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
        return x_BLM + y_BLM, LayerRouting(decision, output.kept_TK, output.outputs_TKM)


class LanguageModel(nn.Module):
    """Pre-norm transformer with tied embeddings and MoE in every n-th layer.

    Parameters start from a draw that depends on (seed, parameter name, expert number) alone: runs with different
    routers, expert-parallel sizes or numbers of ranks share their start. Built under ``torch.device("meta")`` the model
    has shapes and no numbers, enough to be counted.

    Args:
        config: sizes.
        routing: router and balancers.
        setting_of_layer: what the router of each MoE layer is built for.
        vocab_size: V.
        sequence_length: longest L.
        seed: seed of the initial parameters.
        expert_parallel_size: ranks over which the experts are spread.
        data_parallel_group: ranks over which the batch is spread; None for one process.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        moe_layer: class of the MoE layers; DeepSpeed trains those of :mod:`moe_testbed.model.deepspeed_moe`.

    Raises:
        ValueError: the router cannot serve the setting, or DeepSpeed cannot save or send one of its parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        routing: RoutingConfig,
        setting_of_layer: Callable[[int], RouterSetting],
        vocab_size: int,
        sequence_length: int,
        seed: int,
        expert_parallel_size: int = 1,
        data_parallel_group: dist.ProcessGroup | None = None,
        activation_checkpointing: bool = False,
        moe_layer: type[MoELayer] = MoELayer,
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.needs_domains = config.num_moe_layers > 0 and routing.needs_domains
        # Drawn by initialise alone.
        self.embedding = nn.Embedding(
            vocab_size, config.hidden_size, _weight=torch.empty(vocab_size, config.hidden_size)
        )
        self.positions = RotaryPositions(
            config.num_heads, config.hidden_size // config.num_heads, sequence_length, config.rope_theta
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
                    torch.manual_seed(seed_of(seed, f"router.{deciding}"))
                    part = make_layer_router(routing, setting_of_layer(deciding))
                deciding += 1
            self.blocks.append(Block(config, layer, part, expert_parallel_size, keep_outputs, moe_layer))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.balancing: Balancing | None = None
        if deciding:
            moe = config.moe
            self.balancing = Balancing(
                routing.balance, deciding, moe.num_routed_experts, moe.choices, data_parallel_group
            )
        initialise(self, seed, config.num_layers)
        refuse_expert_names(self)
        refuse_scalars(self)

    def forward(self, context: RoutingContext, targets_BL: Tensor) -> ModelOutput:
        """Computes the loss of one micro-batch.

        Args:
            context: input token ids and what routers may know of them.
            targets_BL: next token ids, int64.

        Raises:
            ValueError: the router needs domain labels and a token has none.
            RouterError: what a router returned is no routing decision.
        """
        x_BLM, layers = self._run_blocks(context)
        shares_T = None if context.valid_T is None else context.valid_T / context.valid_T.sum().clamp(min=1)
        hidden_TM = self.final_norm(x_BLM).flatten(0, 1)
        loss, cross_entropy_T = next_token_loss(hidden_TM, self.embedding.weight, targets_BL.flatten(), shares_T)
        cross_entropy_BL = cross_entropy_T.view_as(targets_BL)
        if self.balancing is None or not self.training:
            return ModelOutput(loss, cross_entropy_BL, layers, {})
        decisions = self._decisions(layers)
        outputs_TKM = [layer.outputs_TKM for layer in layers if layer.outputs_TKM is not None]
        terms = self.balancing(decisions, context, outputs_TKM)
        for y, (router, decision) in enumerate(zip(self.routers(), decisions, strict=True)):
            router.observe(decision, context.at_layer(y))
        return ModelOutput(loss + terms.loss, cross_entropy_BL, layers, terms.values)

    def _run_blocks(self, context: RoutingContext) -> tuple[Tensor, list[LayerRouting]]:
        """Hidden states before the last norm, [B, L, M], and what each MoE layer did."""
        if self.needs_domains and bool((context.domain_BL == UNLABELLED).any()):
            raise ValueError("the router needs a domain label for every token, but the mix has unlabelled documents")
        if self.balancing is not None:
            context = replace(context, selection_bias_YE=self.balancing.selection_bias_YE())
        x_BLM = self.embedding(context.token_ids_BL)
        layers: list[LayerRouting] = []
        recompute = self.activation_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = x_BLM, self.positions, context.at_layer(len(layers)), layers[-1].decision if layers else None
            x_BLM, routing = checkpoint(block, *inputs, use_reentrant=False) if recompute else block(*inputs)
            if routing is not None:
                layers.append(routing)
        return x_BLM, layers

    def _decisions(self, layers: list[LayerRouting]) -> list[RoutingDecision]:
        """The decisions that were made, without those that were reused."""
        return [layer.decision for layer in layers[: len(self.routers())]]

    @property
    def reads_counts_ahead(self) -> bool:
        """A balancer needs :meth:`begin_step` where a step has several micro-batches."""
        return self.balancing is not None and self.balancing.reads_counts_ahead

    @torch.no_grad()
    def begin_step(self, contexts: Iterable[RoutingContext]) -> None:
        """Routes all micro-batches of this rank's step ahead, and tells the balancers how the whole step will be
        loaded."""
        if self.balancing is not None:
            self.balancing.begin_step(
                (self._decisions(self._run_blocks(context)[1]), context.valid_T) for context in contexts
            )

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
