"""What the experts cause and how alike they are: ablations of a model whose training is over.

Shape legend: Y MoE layers, E experts, D domains, N evaluated sequences, T tokens of the probe, M model width, F
feed-forward width, X weights of a neuron.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from moe_testbed.launcher.run.arrays import Ablation
from moe_testbed.routing import metrics

Float = npt.NDArray[np.floating[Any]]

MOST_EXPERTS = 256
"""Most experts, of all layers together, that are ablated one by one; of more, as many evenly spaced ones are."""

MOST_COMPARED, MOST_NEURONS = 32, 512
"""Most experts of a layer, and most neurons of each, whose weights are compared: neurons are matched for every pair."""


class Subject(Protocol):
    """A model and a sample of sequences. Losses are mean nats per token of each sequence, float64 [N].

    On several ranks, all call the same methods in the same order and get the same results.
    """

    def losses(self) -> Float:
        """Returns the losses of the model as it is."""

    def losses_without(self, layer: int, expert: int) -> Float:
        """Returns the losses with an expert barred, so that its tokens choose again among the others."""

    def losses_with_mean(self, layer: int, expert: int) -> Float:
        """Returns the losses with an expert's output replaced by its mean over the sample's tokens that use it; nan if
        none does."""

    def losses_with_experts_of(self, domain: int, allowed_YE: npt.NDArray[np.bool_]) -> Float:
        """Returns the losses with all tokens sent to a domain's experts only, in all layers; where the router reads
        labels, with all tokens labelled as this domain's."""

    def outputs(self, layer: int) -> Float:
        """Returns the outputs of every expert for the same tokens, without routing weights, [E, T, M]."""

    def neurons(self, layer: int) -> Float | None:
        """Returns all weights of every neuron of every expert, [E, F, X], nan for an expert without neurons; None where
        they are too many to be compared."""


def ablate(
    subject: Subject,
    domains: tuple[str, ...],
    counts_YDE: npt.NDArray[np.int64],
    domain_N: npt.NDArray[np.int64],
    progress: bool = False,
) -> Ablation:
    """Bars and replaces the experts one by one, forces the tokens to each domain's experts, and compares the experts.

    Args:
        domains: their names.
        counts_YDE: top-k assignments of the whole evaluation set; they say which domain owns an expert.
        domain_N: domain of each sequence of the sample.
        progress: whether to show progress on stderr.

    Returns:
        Losses in which experts that were not ablated have rows of nan, and so has a domain that is left without any
        expert in a layer.
    """
    (Y, D, E), N = counts_YDE.shape, len(domain_N)
    baseline_loss_N = np.asarray(subject.losses(), dtype=np.float64)
    group_YE = np.stack([metrics.matched_groups(counts_DE) for counts_DE in counts_YDE])
    ablation_loss_YEN, mean_loss_YEN, forced_loss_DN = (np.full((*of, N), np.nan) for of in ((Y, E), (Y, E), (D,)))
    for y, e in tqdm(ablated_experts(Y, E), desc="ablating", unit="expert", disable=not progress, mininterval=1.0):
        ablation_loss_YEN[y, e] = subject.losses_without(y, e)
        mean_loss_YEN[y, e] = subject.losses_with_mean(y, e)
    for domain in range(D):
        allowed_YE = group_YE == domain
        if allowed_YE.any(axis=1).all():
            forced_loss_DN[domain] = subject.losses_with_experts_of(domain, allowed_YE)
    return Ablation(
        domains=domains,
        baseline_loss_N=baseline_loss_N,
        sequence_domain_N=domain_N,
        owner_YE=np.stack([metrics.owners(counts_DE)[0] for counts_DE in counts_YDE]),
        group_YE=group_YE,
        ablation_loss_YEN=ablation_loss_YEN,
        mean_loss_YEN=mean_loss_YEN,
        forced_loss_DN=forced_loss_DN,
        **_redundancy(subject, Y),
    )


def ablated_experts(num_layers: int, num_experts: int) -> list[tuple[int, int]]:
    """Returns (layer, expert) of the experts that are ablated one by one."""
    everyone = num_layers * num_experts
    numbers = np.arange(min(everyone, MOST_EXPERTS)) * everyone // min(everyone, MOST_EXPERTS)
    return [divmod(int(number), num_experts) for number in numbers]


def _redundancy(subject: Subject, num_layers: int) -> dict[str, Any]:
    """Returns how alike the experts of each layer are, by their outputs and their weights: part of an `Ablation`."""
    of_layers: dict[str, list[Any]] = {}
    tokens = 0
    for y in range(num_layers):
        outputs_ETM, neurons_EFX = subject.outputs(y), subject.neurons(y)
        tokens = outputs_ETM.shape[1]
        found: dict[str, Any] = {
            "expert_cosine_YEE": metrics.cosine_matrix(outputs_ETM),
            "expert_cka_YEE": metrics.cka_matrix(outputs_ETM),
            "effective_rank_Y": metrics.effective_rank(outputs_ETM),
        }
        if neurons_EFX is not None:
            found["weight_cosine_YEE"] = metrics.weight_cosine_matrix(neurons_EFX)
        for name, value in found.items():
            of_layers.setdefault(name, []).append(value)
    return {name: np.stack(values) for name, values in of_layers.items()} | {"redundancy_tokens": tokens}
