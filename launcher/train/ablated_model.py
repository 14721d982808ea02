"""Our model as the subject of ablations.

Shape legend: N evaluated sequences, B sequences of a rank's share, L positions, t tokens of a rank's share, T tokens of
the probe, K choices, Y MoE layers, D domains, E experts, M model width, F feed-forward width, X weights of a neuron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.arrays import Ablation
from moe_testbed.launcher.train.ablation import MOST_COMPARED, MOST_NEURONS, Float, ablate
from moe_testbed.launcher.train.evaluation_set import EvaluationSet, Share, mean_losses
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.moe import MoELayer, MoEOutput
from moe_testbed.routing.records import NO_EXPERT, RoutingContext, RoutingDecision

_PROBE_TOKENS = 256
_LARGEST_OUTPUTS = 2**25  # most numbers in all experts' outputs for the probe tokens, which are fewer if need be


@torch.no_grad()
def ablate_model(
    model: LanguageModel,
    sample: EvaluationSet,
    counts_YDE: npt.NDArray[np.int64],
    micro_batch_size: int,
    step: int,
    ranks: Ranks,
) -> Ablation:
    """Ablates the experts of a model one by one, on all ranks, and leaves the model as it was.

    No token is dropped, also where the model was trained with capacity dispatch: an expert that is barred would
    otherwise fill the buffers of the others.

    Args:
        model: has at least one MoE layer.
        sample: the sequences whose losses are compared.
        counts_YDE: top-k assignments of the whole evaluation set.
        micro_batch_size: most sequences that a rank runs at once.
        step: optimizer steps completed.

    Returns:
        The same on every rank.
    """
    training = model.training
    with ExitStack() as stack:
        for moe in model.moe_layers():
            stack.enter_context(_without_drops(moe))
        subject = AblatedModel(model.eval(), sample, micro_batch_size, step, ranks)
        found = ablate(subject, sample.domains, counts_YDE, sample.domain_N, progress=ranks.rank == 0)
    model.train(training)
    return found


class AblatedModel:
    """A model in evaluation, without drops, and a sample of sequences: a `Subject`."""

    def __init__(
        self, model: LanguageModel, sample: EvaluationSet, micro_batch_size: int, step: int, ranks: Ranks
    ) -> None:
        self.model, self.ranks = model, ranks
        self.layers = model.moe_layers()
        self.encoder_layers = len(next(iter(model.stacks.values())).moe_layers())
        self.shares = list(sample.shares(ranks, micro_batch_size, step))
        # Of each sequence as many tokens as every stack reads.
        self.num_sequences, self.length = len(sample), sample.shortest
        self.num_experts, width = model.config.moe.num_routed_experts, model.config.hidden_size
        Y, E, tokens = len(self.layers), self.num_experts, self.num_sequences * self.length
        most = max(1, min(_PROBE_TOKENS, tokens, _LARGEST_OUTPUTS // (E * width)))
        self.probe_T = torch.arange(most, device=ranks.device) * tokens // most
        self.probe_YTM = torch.zeros(Y, most, width, device=ranks.device)
        self.output_sum_YEM = torch.zeros(Y, E, width, dtype=torch.float64, device=ranks.device)
        self.uses_YE = torch.zeros(Y, E, dtype=torch.int64, device=ranks.device)
        self.before: list[dict[nn.Module, Any]] = []
        self.before_layer: int | None = None
        self.baseline_N = self._watch()

    def losses(self) -> Float:
        return self.baseline_N

    def losses_without(self, layer: int, expert: int) -> Float:
        barred_YE = np.zeros((len(self.layers), self.num_experts), dtype=np.bool_)
        barred_YE[layer, expert] = True
        return self._losses(layer, lambda context: self._barring(context, barred_YE))

    def losses_with_mean(self, layer: int, expert: int) -> Float:
        uses = int(self.uses_YE[layer, expert])
        if not uses:
            return np.full(self.num_sequences, np.nan)
        mean_M = self.output_sum_YEM[layer, expert] / uses

        def stand_in(moe: MoELayer, inputs: tuple[Tensor, RoutingDecision], output: MoEOutput) -> MoEOutput:
            hidden_BLM, decision = inputs
            own_tK = decision.expert_ids_TK == expert
            ids_tK = decision.expert_ids_TK.where(own_tK, NO_EXPERT)
            weights_tK = decision.weights_TK.where(own_tK, 0.0)
            mine_BLM = moe.forward(
                hidden_BLM, replace(decision, expert_ids_TK=ids_tK, weights_TK=weights_tK)
            ).hidden_BLM
            mean_tM = weights_tK.sum(1, keepdim=True) * mean_M.to(weights_tK.dtype)
            changed_BLM = output.hidden_BLM - mine_BLM + mean_tM.to(hidden_BLM.dtype).view_as(hidden_BLM)
            return replace(output, hidden_BLM=changed_BLM)

        with _hooked({self.layers[layer]: stand_in}):
            return self._losses(layer)

    def losses_with_experts_of(self, domain: int, allowed_YE: npt.NDArray[np.bool_]) -> Float:
        if self.model.needs_domains:
            return self._losses(0, lambda context: _as_domain(context, domain))
        return self._losses(0, lambda context: self._barring(context, ~allowed_YE))

    def outputs(self, layer: int) -> Float:
        moe, probe_1TM = self.layers[layer], self.probe_YTM[layer][None]
        probe_1TM = probe_1TM.to(self.model.embedding.weight.dtype)
        of_experts = [moe.forward(probe_1TM, _all_to(e, probe_1TM)).hidden_BLM[0] for e in range(self.num_experts)]
        outputs: Float = torch.stack(of_experts).float().cpu().numpy()
        return outputs

    def neurons(self, layer: int) -> Float | None:
        if self.num_experts > MOST_COMPARED or self.model.config.moe.expert_size > MOST_NEURONS:
            return None
        neurons_EFX = _neurons_EFX(self.layers[layer]).float().cpu().numpy()
        without = self.num_experts - len(neurons_EFX)
        return np.pad(neurons_EFX, ((0, without), (0, 0), (0, 0)), constant_values=np.nan)

    def _barring(self, context: RoutingContext, barred_YE: npt.NDArray[np.bool_]) -> RoutingContext:
        barred = torch.from_numpy(barred_YE).to(self.ranks.device)
        return replace(context, barred_YBE=barred[:, None].expand(-1, len(context.sequence_B), -1))

    def _losses(
        self, layer: int, change: Callable[[RoutingContext], RoutingContext] = lambda context: context
    ) -> Float:
        """Returns the losses of a model that is unchanged before an MoE layer."""
        self._keep_what_is_before(layer)
        loss_N = torch.zeros(self.num_sequences, dtype=torch.float64, device=self.ranks.device)
        for share, before in zip(self.shares, self.before, strict=True):
            with _returning(before):
                output = self.model(change(share.context), share.targets_BL)
            loss_N[share.numbers_B] = mean_losses(output.cross_entropy_BL, share.targets_BL)[share.counted_B]
        losses: Float = self._sum(loss_N).cpu().numpy()
        return losses

    def _keep_what_is_before(self, layer: int) -> None:
        """Keeps what the blocks below an MoE layer and the attention of its own block return for each share, so that
        they need not run again for each of its experts."""
        if self.before_layer == layer:
            return
        stacks = [stack.layers for stack in self.model.stacks.values()]
        blocks = [block for stack in stacks for block in stack]
        place = [block.moe for block in blocks].index(self.layers[layer])
        below, attention = blocks[:place], blocks[place].attention
        # Of the other blocks nobody reads the hidden states.
        read = {attention, *below[-1:], *(stack[-1] for stack in stacks)}

        def keep(outputs: dict[nn.Module, Any], module: nn.Module, inputs: Any, output: Any) -> None:
            outputs[module] = output if module in read else (output[0].new_empty(0), output[1])

        self.before_layer, self.before = layer, [{} for _ in self.shares]
        for share, outputs in zip(self.shares, self.before, strict=True):
            with _hooked(dict.fromkeys([*below, attention], partial(keep, outputs))):
                self.model(share.context, share.targets_BL)

    def _sum(self, values: Tensor) -> Tensor:
        """Sums values up over the ranks, in place."""
        if self.ranks.group is not None:
            dist.all_reduce(values, group=self.ranks.group)
        return values

    def _watch(self) -> Float:
        """Returns the losses of the model as it is, and keeps the experts' summed outputs and the hidden states of the
        probe tokens."""
        loss_N = torch.zeros(self.num_sequences, dtype=torch.float64, device=self.ranks.device)
        for share in self.shares:
            hooks = {moe: self._watcher(y, share) for y, moe in enumerate(self.layers)}
            with _hooked(hooks):
                output = self.model(share.context, share.targets_BL)
            loss_N[share.numbers_B] = mean_losses(output.cross_entropy_BL, share.targets_BL)[share.counted_B]
        for table in (self.output_sum_YEM, self.uses_YE, self.probe_YTM, loss_N):
            self._sum(table)
        losses: Float = loss_N.cpu().numpy()
        return losses

    def _watcher(self, y: int, share: Share) -> Callable[[MoELayer, tuple[Tensor, RoutingDecision], MoEOutput], None]:
        def watch(moe: MoELayer, inputs: tuple[Tensor, RoutingDecision], output: MoEOutput) -> None:
            hidden_BLM, decision = inputs
            counted_BL = share.counted_B[:, None].expand(hidden_BLM.shape[:2])
            # In a model with a decoder, the first layers are the encoder's.
            context = share.context if y >= self.encoder_layers else share.context.encoder or share.context
            if context.valid_BL is not None:
                counted_BL = counted_BL & context.valid_BL
            counted_t1 = counted_BL.reshape(-1, 1)
            self._add_outputs(y, moe, hidden_BLM, decision.expert_ids_TK.where(counted_t1, NO_EXPERT))
            self._take_probe(y, hidden_BLM, share)

        return watch

    def _add_outputs(self, y: int, moe: MoELayer, hidden_BLM: Tensor, ids_tK: Tensor) -> None:
        """Adds every choice's unweighted output to its expert's sum."""
        width = torch.tensor(ids_tK.shape[1], device=ids_tK.device)
        if self.ranks.group is not None:
            # Experts on several ranks need all ranks, also one whose tokens choose fewer.
            dist.all_reduce(width, dist.ReduceOp.MAX, group=self.ranks.group)
        for k in range(int(width)):
            ids_t = ids_tK[:, k] if k < ids_tK.shape[1] else torch.full_like(ids_tK[:, 0], NO_EXPERT)
            decision = RoutingDecision(ids_t[:, None], (ids_t != NO_EXPERT).float()[:, None])
            outputs_tM = moe.forward(hidden_BLM, decision).hidden_BLM.flatten(0, 1).double()
            used_t = ids_t != NO_EXPERT
            self.output_sum_YEM[y].index_add_(0, ids_t[used_t], outputs_tM[used_t])
            self.uses_YE[y] += torch.bincount(ids_t[used_t], minlength=self.num_experts)

    def _take_probe(self, y: int, hidden_BLM: Tensor, share: Share) -> None:
        """Keeps the hidden states of the probe tokens in this share."""
        sequence_T, place_T = self.probe_T // self.length, self.probe_T % self.length
        here_T = torch.isin(sequence_T, share.numbers_B)
        row_T = torch.searchsorted(share.numbers_B, sequence_T[here_T])
        self.probe_YTM[y, here_T] = hidden_BLM[share.counted_B][row_T, place_T[here_T]].float()


def _as_domain(context: RoutingContext, domain: int) -> RoutingContext:
    """Returns the context with one domain as the label of all tokens, in every stack."""
    return replace(
        context,
        domain_BL=torch.full_like(context.domain_BL, domain),
        encoder=None if context.encoder is None else _as_domain(context.encoder, domain),
    )


@contextmanager
def _without_drops(moe: MoELayer) -> Iterator[None]:
    """Lets no assignment of a layer be dropped, whatever is configured."""
    way = moe.deepspeed_moe
    drops, way.drops = way.drops, False
    try:
        yield
    finally:
        way.drops = drops


@torch.no_grad()
def _neurons_EFX(moe: MoELayer) -> Tensor:
    """Returns all weights of each neuron of the experts with a feed-forward layer, of all ranks: what its gate reads,
    what it reads, what it writes. [E, F, 3 * M]."""
    gate, up = moe.experts.gate_up.transpose(1, 2).chunk(2, dim=1)
    mine = torch.cat([gate, up, moe.experts.down], dim=-1)
    if moe.group is None:
        return mine
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(moe.group))]
    dist.all_gather(parts, mine, group=moe.group)
    return torch.cat(parts)


def _all_to(expert: int, hidden_BLM: Tensor) -> RoutingDecision:
    """Returns the decision that sends all tokens to one expert, with weight 1."""
    tokens = hidden_BLM.shape[0] * hidden_BLM.shape[1]
    ids_t1 = torch.full((tokens, 1), expert, dtype=torch.int64, device=hidden_BLM.device)
    return RoutingDecision(ids_t1, torch.ones(tokens, 1, device=hidden_BLM.device))


@contextmanager
def _returning(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Lets modules return these outputs, whatever they are given."""
    for module, output in outputs.items():
        module.forward = lambda *_, output=output: output
    try:
        yield
    finally:
        for module in outputs:
            del module.forward


@contextmanager
def _hooked(hooks: Mapping[Any, Callable[..., MoEOutput | None]]) -> Iterator[None]:
    """Calls each hook after its module's forward; what it returns takes the place of the module's output."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
