"""The parts of a language model: its tables and its stacks, how they start, and which of them are still.

Shape legend: B sequences, L positions, M model width, V token ids.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.model.config import DECODER, ENCODER, ModelConfig
from moe_testbed.model.initialisation import initialise, refuse_expert_names, refuse_scalars
from moe_testbed.model.moe import MoELayer
from moe_testbed.model.stack import Stack, StackSetting, seen
from moe_testbed.model.transformer import Memory
from moe_testbed.routing.config import RoutingConfig
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.router import Router


class Architecture(nn.Module):
    """An embedding, and pre-norm transformer stacks with MoE in every n-th layer.

    Parameters start from a draw that depends on (seed, parameter name, expert number) alone: runs with different
    routers, expert-parallel sizes or numbers of ranks share their start. Built under ``torch.device("meta")`` the model
    has shapes and no numbers, enough to be counted.

    A causal model has the modules of its stack as its own, without the stack's name in front; so its checkpoints have
    had them since before there were others.

    Args:
        config: sizes.
        routing: routers and balancers.
        setting_of_layer: what the router of each MoE layer is built for; the encoder's are numbered first.
        vocab_size: rows of the embedding.
        sequence_length: longest L, of either text.
        seed: seed of the initial parameters.
        expert_parallel_size: ranks over which the experts are spread.
        data_parallel_group: ranks over which the batch is spread; None for one process.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        moe_layer: class of the MoE layers; DeepSpeed trains those of :mod:`moe_testbed.model.deepspeed_moe`.
        output_ids: token ids that can be a target, in rising order; None: all of them. The others are left out of the
            softmax.

    Attributes:
        frozen: names of the stacks that are still, see :meth:`freeze`.

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
        output_ids: range | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.frozen: frozenset[str] = frozenset()
        self._output_ids = output_ids
        shape = vocab_size, config.hidden_size
        # Drawn by initialise alone.
        self.embedding = nn.Embedding(*shape, _weight=torch.empty(shape))
        stacks: dict[str, Stack] = {}
        for name in config.stacks:
            own, first = config.of_stack(name), sum(stack.config.num_moe_layers for stack in stacks.values())
            setting = StackSetting(
                name,
                causal=name == DECODER,
                has_memory=config.architecture == "encoder_decoder" and name == DECODER,
                setting_of_layer=partial(_from_layer, setting_of_layer, first),
                sequence_length=sequence_length,
                seed=seed,
                seed_prefix="" if config.architecture == "causal" else f"{name}.",
                expert_parallel_size=expert_parallel_size,
                data_parallel_group=data_parallel_group,
                activation_checkpointing=activation_checkpointing,
                moe_layer=moe_layer,
            )
            stacks[name] = Stack(own, routing.of_stack(name), setting)
        for name, stack in stacks.items():
            for child_name, child in stack.named_children() if config.architecture == "causal" else [(name, stack)]:
                self.add_module(child_name, child)
        self._stacks: Mapping[str, Stack] = stacks
        if config.embeddings != "shared":
            if config.architecture == "encoder_decoder":
                self.decoder_embedding = nn.Embedding(*shape, _weight=torch.empty(shape))
            self.output_embedding = nn.Embedding(*shape, _weight=torch.empty(shape))
        has_memory = config.architecture == "encoder_decoder"
        writers = {name: 3 if has_memory and name == DECODER else 2 for name in stacks}
        initialise(self, seed, {name: writers[name] * stack.config.num_layers for name, stack in stacks.items()})
        if config.embeddings == "equal_start":
            for table in (getattr(self, "decoder_embedding", self.embedding), self.output_embedding):
                table.weight.data.copy_(self.embedding.weight)
        refuse_expert_names(self)
        refuse_scalars(self)

    def _output_weight(self) -> Tensor:
        table = self.embedding if self.config.embeddings == "shared" else self.output_embedding
        weight = table.weight.detach() if self._is_frozen(table) else table.weight
        return weight if self._output_ids is None else weight[: self._output_ids.stop]

    def _embed(self, name: str, token_ids_BL: Tensor) -> Tensor:
        """What the stack of this name reads, [B, L, M]."""
        table = getattr(self, "decoder_embedding", self.embedding) if name == DECODER else self.embedding
        with torch.no_grad() if self._is_frozen(table) else contextlib.nullcontext():
            x_BLM: Tensor = table(token_ids_BL)
        return x_BLM

    def _is_frozen(self, table: nn.Embedding) -> bool:
        """Whether a table is still: the encoder's is with it, also where others read it."""
        return (ENCODER if table is self.embedding else DECODER) in self.frozen

    @property
    def output_rows(self) -> int:
        """How many token ids can be a target."""
        return self.embedding.num_embeddings if self._output_ids is None else self._output_ids.stop

    def encode(self, context: RoutingContext) -> Tensor:
        """Returns the output of the first stack, [B, L, M]: of the encoder if there is one.

        Args:
            context: of the text that this stack reads.
        """
        name, stack = next(iter(self._stacks.items()))
        with torch.no_grad() if name in self.frozen else contextlib.nullcontext():
            hidden_BLM: Tensor = stack(self._embed(name, context.token_ids_BL), context)[0]
        return hidden_BLM

    def memory(self, context: RoutingContext) -> Memory:
        """Returns what a decoder sees of the encoder.

        Args:
            context: of the text that the encoder reads.
        """
        return Memory(self.encode(context), seen(context))

    def next_logits(self, context: RoutingContext, memory: Memory | None = None) -> Tensor:
        """Returns the logits behind the last place of what the decoder reads, [B, V].

        Args:
            context: of that text, without padding.
            memory: what an encoder has made of another text, see `memory`; None for a causal model.
        """
        hidden_BLM = self._stacks[DECODER](self._embed(DECODER, context.token_ids_BL), context, memory)[0]
        return hidden_BLM[:, -1] @ self._output_weight().t()

    def freeze(self, stacks: Iterable[str]) -> None:
        """Holds stacks still from here on, and no others: they run without gradient and as in evaluation, so that
        their routers and balancers do not move either, and the encoder's embedding with it."""
        frozen = frozenset(stacks)
        if frozen != self.frozen:
            self.frozen = frozen
            self.train(self.training)

    def train(self, mode: bool = True) -> Architecture:
        """Sets the mode of all parts but those that are frozen, which stay in evaluation."""
        super().train(mode)
        for name, stack in self._stacks.items():
            # The stack of a causal model is not among its modules.
            stack.train(mode and name not in self.frozen)
        return self

    @property
    def reads_counts_ahead(self) -> bool:
        """A balancer needs :meth:`begin_step` where a step has several micro-batches."""
        balancings = [stack.balancing for stack in self._moving()]
        return any(balancing is not None and balancing.reads_counts_ahead for balancing in balancings)

    def finish_step(self) -> None:
        """Tells balancers and routers that an optimizer step is complete."""
        for stack in self._moving():
            stack.finish_step()

    def _moving(self) -> list[Stack]:
        return [stack for name, stack in self._stacks.items() if name not in self.frozen]

    @property
    def needs_domains(self) -> bool:
        """A router, or its input, is made from domain labels."""
        return any(stack.needs_domains for stack in self._stacks.values())

    @property
    def stacks(self) -> Mapping[str, Stack]:
        """The stacks by name, from the input to the output."""
        return self._stacks

    def routers(self) -> list[Router]:
        """Returns the routers of the layers that decide, in order."""
        return [router for stack in self._stacks.values() for router in stack.routers()]

    def moe_layers(self) -> list[MoELayer]:
        """Returns the MoE layers, in order."""
        return [layer for stack in self._stacks.values() for layer in stack.moe_layers()]

    def part_of(self, parameter_name: str) -> str:
        """Returns the name of the stack with which a parameter freezes."""
        if len(self._stacks) == 1:
            return next(iter(self._stacks))
        return ENCODER if parameter_name.startswith((f"{ENCODER}.", "embedding.")) else DECODER


def _from_layer(setting_of_layer: Callable[[int], RouterSetting], first: int, layer: int) -> RouterSetting:
    return setting_of_layer(first + layer)
