"""Runs labelled passages through a model of the hub's format and counts what its routers do, through forward hooks.

Shape legend: T tokens of a batch that count, X tokens of a batch, B sequences: passages of a batch, L positions, N
evaluated sequences: passages, C clusters, D domains, E experts, K choices, V token ids, M model width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_testbed.launcher.analyze.families import Family, RouterModule, find_routers, read_output
from moe_testbed.launcher.analyze.passages import Passages, TokenBatch, Tokens
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.routing.metrics.recording import RoutingTables, tracked_ids


@dataclass(frozen=True)
class Labels:
    """Labels of the tokens of a batch that count. `counted_X` tells which of all they are."""

    counted_X: Tensor
    domain_T: Tensor
    cluster_T: Tensor
    shuffled_T: Tensor
    token_ids_T: Tensor


class Recorder:
    """Streams the routing into tables, layer by layer while the model runs; nothing of a token is kept.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        family: what its routers return.
        passages, tokens: what it reads.
        device: where the model is.

    Raises:
        CheckpointError: the model has no router, or its MoE layers differ in size.
    """

    def __init__(
        self, model: Any, family: Family, passages: Passages, tokens: Tokens, batch_size: int, device: torch.device
    ) -> None:
        self.model, self.family, self.device = model, family, device
        self.passages, self.tokens, self.batch_size = passages, tokens, batch_size
        self.routers = find_routers(model, family)
        sizes = {(len(router.vectors_EX), router.top_k) for router in self.routers}
        if len(sizes) > 1:
            raise CheckpointError(
                f"the MoE layers differ in (experts, experts per token): {sorted(sizes)}; not supported"
            )
        ((self.num_experts, self.top_k),) = sizes
        # Another label for every passage: what counts show by chance.
        order = np.random.default_rng(0).permutation(len(passages.texts))
        self.shuffled_N = passages.domain_N[order]
        self.cut_N = np.zeros(len(passages.texts), dtype=np.bool_)
        self.tables = RoutingTables(
            len(self.routers),
            len(passages.domains),
            self.num_experts,
            self.top_k,
            len(passages.cluster_domain_C),
            tracked_ids(self._token_counts()),
            device,
        )
        for y, router in enumerate(self.routers):
            self.tables.add_vectors(y, router.vectors_EX)

    @torch.no_grad()
    def run(self) -> Evaluation:
        """Reads all passages.

        Returns:
            Losses in nats per token of the model's own tokenizer, and no steps. Passages differ in length: the plain
            mean of ``sequence_loss_N`` over a domain is its loss per token all the same.

        Raises:
            CheckpointError: a router was not called or returned something else, or a domain has no token that counts.
        """
        passages = self.passages
        loss_sum_N = torch.zeros(len(passages.texts), dtype=torch.float64, device=self.device)
        tokens_N = torch.zeros(len(passages.texts), dtype=torch.int64, device=self.device)
        for batch in self._batches():
            rows = slice(batch.first, batch.first + len(batch.token_ids_BL))
            with self._hooks(self._labels(batch)) as called:
                hidden_BLM = self.model.base_model(
                    input_ids=batch.token_ids_BL, attention_mask=batch.attended_BL.long(), use_cache=False
                ).last_hidden_state
            if sorted(called) != list(range(len(self.routers))):
                raise CheckpointError(
                    f"not every router was called once in a forward pass, but the MoE layers {sorted(called)} were: "
                    "kernels or a quantisation that go around the router are not supported; load the plain model"
                )
            loss_sum_N[rows] = self._losses(hidden_BLM, batch)
            tokens_N[rows] = batch.counted_BL.sum(1)
            self.cut_N[rows] = batch.cut_B
        if not loss_sum_N.isfinite().all():
            raise CheckpointError(
                f"the model's losses are not finite on {int((~loss_sum_N.isfinite()).sum())} of {len(loss_sum_N)} "
                f"passages: its numbers overflow in {self.model.dtype}, or its weights are not what was trained; try "
                "--dtype float32"
            )
        domain_N = torch.from_numpy(passages.domain_N).to(self.device)
        D = len(passages.domains)
        tokens_D = torch.zeros(D, dtype=torch.int64, device=self.device).index_add_(0, domain_N, tokens_N)
        if not tokens_D.all():
            name = passages.domains[int((tokens_D == 0).nonzero()[0])]
            raise CheckpointError(
                f"the tokenizer makes no countable token of the domain '{name}', only special ones: it does not know "
                "its characters; give another one with --tokenizer, or a mix without this domain"
            )
        loss_sum_D = torch.zeros(D, dtype=torch.float64, device=self.device).index_add_(0, domain_N, loss_sum_N)
        sums = {
            "tokens_D": tokens_D,
            "loss_sum_D": loss_sum_D,
            "sequence_loss_N": _linearised(loss_sum_N, tokens_N, domain_N, loss_sum_D / tokens_D),
        }
        return Evaluation(
            step=0,
            domains=tuple(passages.domains),
            sequence_domain_N=passages.domain_N,
            sequence_cluster_N=passages.cluster_N,
            cluster_domain_C=passages.cluster_domain_C,
            kinds=None,
            **{name: tensor.cpu().numpy() for name, tensor in sums.items()},
            **self.tables.arrays(),
        )

    def cut_shares(self) -> dict[str, float]:
        """Returns the share of each domain's passages that had more tokens than are read, once they were read."""
        passages = self.passages
        return {name: float(self.cut_N[passages.domain_N == d].mean()) for d, name in enumerate(passages.domains)}

    def _batches(self) -> Iterator[TokenBatch]:
        return self.tokens.batches(self.passages, self.batch_size, self.device)

    def _token_counts(self) -> npt.NDArray[np.int64]:
        """Occurrences of every token id."""
        size = max(self.model.get_input_embeddings().weight.shape[0], len(self.tokens.tokenizer))
        counts_V = np.zeros(size, dtype=np.int64)
        for batch in self._batches():
            counts_V += np.bincount(batch.token_ids_BL[batch.counted_BL].cpu().numpy(), minlength=size)
        return counts_V

    def _labels(self, batch: TokenBatch) -> Labels:
        rows = slice(batch.first, batch.first + len(batch.token_ids_BL))

        def of_tokens(values_N: npt.NDArray[np.int64]) -> Tensor:
            values_B = torch.from_numpy(values_N[rows]).to(self.device)
            return values_B[:, None].expand_as(batch.counted_BL)[batch.counted_BL]

        return Labels(
            batch.counted_BL.reshape(-1),
            of_tokens(self.passages.domain_N),
            of_tokens(self.passages.cluster_N),
            of_tokens(self.shuffled_N),
            batch.token_ids_BL[batch.counted_BL],
        )

    @contextmanager
    def _hooks(self, labels: Labels) -> Iterator[list[int]]:
        """Counts every call of a router while it is open; yields the MoE layers that were called."""
        called: list[int] = []

        def receive(y: int, module: nn.Module, inputs: Any, output: Any) -> None:
            called.append(y)
            routed = read_output(output, self.family, len(labels.counted_X))
            self.tables.add(
                y,
                routed.expert_ids_TK[labels.counted_X],
                routed.weights_TK[labels.counted_X],
                labels.domain_T,
                labels.cluster_T,
                labels.token_ids_T,
                probabilities_TE=routed.probabilities_TE[labels.counted_X],
                shuffled_T=labels.shuffled_T,
            )

        handles = [router.module.register_forward_hook(partial(receive, y)) for y, router in enumerate(self.routers)]
        try:
            yield called
        finally:
            for handle in handles:
                handle.remove()

    def _losses(self, hidden_BLM: Tensor, batch: TokenBatch) -> Tensor:
        """Returns the sum over each passage, [B]; one passage at a time, since logits are the largest tensors of
        all."""
        output = self.model.get_output_embeddings()
        losses = [
            F.cross_entropy(output(hidden_LM[counted_L]).float(), targets_L[counted_L], reduction="sum").double()
            for hidden_LM, targets_L, counted_L in zip(hidden_BLM, batch.targets_BL, batch.counted_BL, strict=True)
        ]
        return torch.stack(losses)


def active_parameters(model: nn.Module, routers: list[RouterModule], top_k: int) -> int:
    """Parameters that one token uses: all but those of the routed experts that it does not go to."""
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    return total - experts + experts * top_k // len(routers[0].vectors_EX)


def _linearised(loss_sum_N: Tensor, tokens_N: Tensor, domain_N: Tensor, loss_D: Tensor) -> Tensor:
    """Returns ``L_d + (s_n - L_d t_n) N_d / t_d`` for a passage of t_n tokens and summed loss s_n, [N].

    Its mean over the N_d passages of a domain is the domain's loss per token, L_d, and its variance that of this ratio
    (delta method), so that what resamples sequences of equal length serves passages of any length.
    """
    sizes_D = torch.bincount(domain_N, minlength=len(loss_D))
    tokens_D = torch.zeros_like(sizes_D).index_add_(0, domain_N, tokens_N)
    loss_N = loss_D[domain_N]
    return loss_N + (loss_sum_N - loss_N * tokens_N) * (sizes_D / tokens_D)[domain_N]
