"""The decoder-only language model.

Shape legend: B sequences, L positions, T = B * L tokens, D model width, V vocabulary, E experts, K choices, Y MoE
layers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_testbed.model.config import ModelConfig
from moe_testbed.model.deepspeed_moe import RoutedMoE, refuse_expert_names
from moe_testbed.model.experts import GroupedExperts
from moe_testbed.model.transformer import Attention, FeedForward, RMSNorm, RotaryPositions
from moe_testbed.routing.balancing import Balancing
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.records import UNLABELLED, RouterSetting, RoutingContext, RoutingDecision
from moe_testbed.routing.router import ROUTERS, Router


@dataclass(frozen=True)
class LayerRouting:
    """What one MoE layer did with the tokens of a micro-batch.

    Attributes:
        decision: the router's.
        kept_TK: assignments that reached their expert, bool; all of them without a capacity.
    """

    decision: RoutingDecision
    kept_TK: Tensor


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
    """Attention, then a dense layer or a router with its experts."""

    def __init__(self, config: ModelConfig, layer: int, router: nn.Module | None, expert_parallel_size: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.attention = Attention(config.hidden_size, config.num_heads)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.router = router
        self.shared: FeedForward | None = None
        self.moe: RoutedMoE | None = None
        if router is None:
            self.dense = FeedForward(config.hidden_size, config.dense_size(layer))
            return
        self.moe = RoutedMoE(config.hidden_size, config.moe, expert_parallel_size)
        if config.moe.num_shared_experts:
            self.shared = FeedForward(config.hidden_size, config.moe.num_shared_experts * config.moe.expert_hidden_size)

    def forward(
        self, x_BLD: Tensor, positions: RotaryPositions, context: RoutingContext
    ) -> tuple[Tensor, LayerRouting | None]:
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), positions)
        normed_BLD = self.feed_forward_norm(x_BLD)
        if self.moe is None or self.router is None:
            return x_BLD + self.dense(normed_BLD), None
        decision = self.router(normed_BLD.reshape(-1, normed_BLD.shape[-1]), context)
        y_BLD, kept_TK = self.moe(normed_BLD, decision)
        if self.shared is not None:
            y_BLD = y_BLD + self.shared(normed_BLD)
        return x_BLD + y_BLD, LayerRouting(decision, kept_TK)


class LanguageModel(nn.Module):
    """Pre-norm transformer with tied embeddings and MoE in every n-th layer.

    Parameters start from a draw that depends on (seed, parameter name, expert number) alone: runs with different
    routers, expert-parallel sizes or numbers of ranks share their start.

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

    Raises:
        ValueError: the router cannot serve the setting, or a name collides with DeepSpeed's checkpoints.
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
    ) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.needs_domains = config.num_moe_layers > 0 and ROUTERS.get(routing.router.name).needs_domains
        self.embedding = nn.Embedding(vocab_size, config.hidden_size)
        self.positions = RotaryPositions(config.hidden_size // config.num_heads, sequence_length, config.rope_theta)
        self.blocks = nn.ModuleList()
        moe_layer = 0
        for layer in range(config.num_layers):
            router = None
            if config.is_moe_layer(layer):
                setting = setting_of_layer(moe_layer)
                # A router draws its own start; the draw must not depend on what was built before it.
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(_seed_of(seed, f"router.{moe_layer}"))
                    router = ROUTERS.get(routing.router.name)(routing.router, setting)
                moe_layer += 1
            self.blocks.append(Block(config, layer, router, expert_parallel_size))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        self.balancing: Balancing | None = None
        if moe_layer:
            self.balancing = Balancing(routing.balance, moe_layer, config.moe.num_experts, data_parallel_group)
        self._initialise(seed)
        refuse_expert_names(self)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        """Normal draws of variance 1 / fan-in; the layers that write to the residual stream are scaled by ``1 / sqrt(2
        * num_layers)``."""
        residual = (2 * self.config.num_layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                _draw(module.weight, seed, name, module.weight.shape[1] ** -0.5)
            elif isinstance(module, nn.Linear) and ".router." not in name:
                writes = name.endswith((".output", ".down"))
                _draw(module.weight, seed, name, module.weight.shape[1] ** -0.5 * (residual if writes else 1.0))
            elif isinstance(module, RoutedMoE):
                experts = module.deepspeed_moe.experts
                assert isinstance(experts, GroupedExperts)
                for part, scale in (("gate_up", 1.0), ("down", residual)):
                    weight = getattr(experts, part)
                    for index in range(experts.num_experts):
                        number = module.first_expert + index
                        _draw(weight[index], seed, f"{name}.{number}.{part}", weight.shape[1] ** -0.5 * scale)

    def forward(self, context: RoutingContext, targets_BL: Tensor) -> ModelOutput:
        """One micro-batch.

        Args:
            context: input token ids and what routers may know of them.
            targets_BL: next token ids, int64.

        Raises:
            ValueError: the router needs domain labels and a token has none.
        """
        if self.needs_domains and bool((context.domain_BL == UNLABELLED).any()):
            raise ValueError("the router needs a domain label for every token, but the mix has unlabelled documents")
        if self.balancing is not None:
            context = replace(context, selection_bias_YE=self.balancing.selection_bias_YE())
        x_BLD = self.embedding(context.token_ids_BL)
        layers: list[LayerRouting] = []
        for block in self.blocks:
            at_layer = context.at_layer(len(layers))
            if self.activation_checkpointing and self.training:
                x_BLD, routing = checkpoint(block, x_BLD, self.positions, at_layer, use_reentrant=False)
            else:
                x_BLD, routing = block(x_BLD, self.positions, at_layer)
            if routing is not None:
                layers.append(routing)
        logits_BLV = F.linear(self.final_norm(x_BLD), self.embedding.weight)
        cross_entropy_BL = F.cross_entropy(
            logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="none"
        ).view_as(targets_BL)
        loss = cross_entropy_BL.mean()
        if context.valid_BL is not None:
            loss = (cross_entropy_BL * context.valid_BL).sum() / context.valid_BL.sum().clamp(min=1)
        if self.balancing is None or not self.training:
            return ModelOutput(loss, cross_entropy_BL, layers, {})
        terms = self.balancing([layer.decision for layer in layers], context)
        for y, router in enumerate(self.routers()):
            router.observe(layers[y].decision, context.at_layer(y))
        return ModelOutput(loss + terms.loss, cross_entropy_BL, layers, terms.values)

    def finish_step(self) -> None:
        """Tells balancers and routers that an optimizer step is complete."""
        if self.balancing is None:
            return
        counts_YE = self.balancing.finish_step()
        for router, counts_E in zip(self.routers(), counts_YE, strict=True):
            router.finish_step(counts_E, self.balancing.mean_over_ranks)

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [block.router for block in self.blocks if isinstance(block.router, Router)]


def _seed_of(seed: int, name: str) -> int:
    return zlib.crc32(f"{seed}/{name}".encode())


def _draw(weight: Tensor, seed: int, name: str, std: float) -> None:
    generator = torch.Generator().manual_seed(_seed_of(seed, name))
    weight.copy_(torch.randn(weight.shape, generator=generator) * std)
