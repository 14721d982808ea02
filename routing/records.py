"""What travels between the model, the routers and the balancers.

Shape legend: B sequences, L positions, T = B * L tokens, M model width, E experts, K choices, Y MoE layers, D domains,
V token ids, X columns of what stands for an expert. All letters of the package are in docs/shapes.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

NO_EXPERT = -1
UNLABELLED = -1


@dataclass(frozen=True)
class RoutingContext:
    """What a router may look at besides the hidden states: what is known of the tokens, where the router
    is asked (``step`` and ``layer``), and what it must heed when it chooses (the last two).

    The properties give the same token by token, and for the layer that asks.

    Attributes:
        token_ids_BL: input token ids, int64.
        domain_BL: domain label of every token, int64, ``UNLABELLED`` where there is none.
        document_BL: document number of every token, int64, not negative; None where documents are not told apart.
        position_BL: position of every token inside its sequence, int64.
        sequence_B: number of every sequence in the training stream (or the evaluation set), int64. It does not depend
            on how the batch was split into ranks and micro-batches, so whatever is drawn from it does not either.
        step: optimizer steps completed.
        layer: MoE layer that asks, counted from 0.
        valid_BL: False for padding, which is counted nowhere; None when there is no padding.
        selection_bias_YE: added to the scores for the selection only, float32; None without a balancer that sets one.
        barred_YBE: experts that the tokens of a sequence may not use, bool; None in training and evaluation, where no
            expert is barred.
        encoder: the same of the text that the encoder reads, in an encoder-decoder model; None in a single stack.
    """

    token_ids_BL: Tensor
    domain_BL: Tensor
    document_BL: Tensor | None
    position_BL: Tensor
    sequence_B: Tensor
    step: int = 0
    layer: int = 0
    valid_BL: Tensor | None = None
    selection_bias_YE: Tensor | None = None
    barred_YBE: Tensor | None = None
    encoder: RoutingContext | None = None

    def at_layer(self, layer: int) -> RoutingContext:
        """The same context as MoE layer ``layer`` sees it."""
        return replace(self, layer=layer)

    @property
    def bias_E(self) -> Tensor | None:
        """Selection bias of the current layer, float32 [E]."""
        return None if self.selection_bias_YE is None else self.selection_bias_YE[self.layer]

    @property
    def barred_TE(self) -> Tensor | None:
        """Experts that each token may not use in the current layer, bool [T, E]; None where none is barred."""
        if self.barred_YBE is None:
            return None
        return self.barred_YBE[self.layer].repeat_interleave(self.token_ids_BL.shape[1], dim=0)

    @property
    def valid_T(self) -> Tensor | None:
        """False for padding, bool [T]; None when there is no padding."""
        return None if self.valid_BL is None else self.valid_BL.reshape(-1)

    @property
    def sequence_T(self) -> Tensor:
        """Number of the sequence that every token belongs to, int64 [T]."""
        return self.sequence_B[:, None].expand_as(self.token_ids_BL).reshape(-1)


@dataclass(frozen=True)
class Noise:
    """What a noisy router's logits are made of: ``logits = clean + noise * scale`` with noise from N(0, 1).

    Attributes:
        clean_TE: logits before the noise, float32.
        scale_TE: standard deviation of the noise, positive, float32.
    """

    clean_TE: Tensor
    scale_TE: Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """What a router returns for the T tokens of a micro-batch.

    Attributes:
        expert_ids_TK: chosen experts, int64, first choice first, ``NO_EXPERT`` where a token uses fewer than K.
        weights_TK: factor of each chosen expert's output, float32, differentiable where the router is; 0 where there is
            no expert.
        probabilities_TE: distribution over the experts that the balancers even out, rows sum to 1, float32; None for a
            router without scores.
        logits_TE: scores before normalisation, float32; None for a router without scores.
        vectors_EX: the vector that stands for each expert in the score, differentiable; None without such vectors.
        noise: the noise in the logits; None without noise, as in evaluation.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    probabilities_TE: Tensor | None = None
    logits_TE: Tensor | None = None
    vectors_EX: Tensor | None = None
    noise: Noise | None = None


@dataclass(frozen=True)
class LayerStep:
    """What a router learns of an optimizer step once it is complete, the same on all ranks.

    Attributes:
        counts_E: assignments of the global batch in this layer, int64.
        tokens: tokens of the global batch without padding, int64 scalar.
        mean_over_ranks: mean of a tensor over the data-parallel ranks.
    """

    counts_E: Tensor
    tokens: Tensor
    mean_over_ranks: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RouterSetting:
    """What a router is built for.

    Attributes:
        num_experts: E.
        top_k: K.
        hidden_size: M.
        layer: MoE layer that the router serves, counted from 0.
        seed: seed of everything fixed at construction (tables, draws).
        domains: names of the mix's domains, in label order.
        domain_weights: share of each domain in the mix, sums to 1.
        token_counts_DV: training tokens of every domain by token id, int64; the tables of hash routers are balanced
            over it.
        data_parallel_group: ranks over which the batch is spread, for routers that choose over a pool of all ranks'
            tokens; None for one process.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    layer: int
    seed: int
    domains: tuple[str, ...]
    domain_weights: tuple[float, ...]
    token_counts_DV: Tensor
    data_parallel_group: dist.ProcessGroup | None = None

    @property
    def vocab_size(self) -> int:
        """How many token ids there are."""
        return self.token_counts_DV.shape[1]

    @property
    def token_weights_V(self) -> Tensor:
        """Expected share of every token id in the training stream, float64, sums to 1."""
        share_DV = self.token_counts_DV.double()
        share_DV = share_DV / share_DV.sum(1, keepdim=True).clamp(min=1)
        return torch.tensor(self.domain_weights, dtype=torch.float64, device=share_DV.device) @ share_DV
