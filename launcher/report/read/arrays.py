"""Reads a run's arrays for a report. What does not fit costs itself, not the report.

Shape legend: O runs, I seeds, N evaluated sequences, C clusters of sequences that share a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moe_testbed.launcher.run.arrays import Ablation, Evaluation, Floats, Integers
from moe_testbed.launcher.run.folder import RunFolder


def read_evaluation(folder: RunFolder, last_step: int) -> tuple[Evaluation, list[str]]:
    """Returns a run's last evaluation, and what of it was left out.

    Raises one of `DAMAGED` if there is none of the last step, or if what every report needs is not whole.
    """
    found, left_out = folder.read_evaluation()
    if found.step != last_step:
        raise ValueError(f"the last one is of step {found.step}, the training ended at {last_step}")
    if np.any(found.tokens_D <= 0):
        raise ValueError("a domain has no tokens in it")
    counts_YDE = found.counts_top_k_YDE
    if len(counts_YDE) and not counts_YDE.size:
        raise ValueError(f"counts_top_k_YDE has shape {counts_YDE.shape}: no domains, or no experts")
    if not np.any(found.sequence_domain_N >= 0):
        raise ValueError("none of its sequences has a domain")
    if np.any(found.dropped_YDE > counts_YDE):
        raise ValueError("dropped_YDE exceeds counts_top_k_YDE, of which it is a part")
    if found.cluster_domain_C is not None and not np.any(found.cluster_domain_C >= 0):
        left_out.append("cluster_domain_C has no domain in it")
        found = replace(found, cluster_domain_C=None)
    return found, left_out


def read_ablation(folder: RunFolder, domains: tuple[str, ...]) -> tuple[Ablation, list[str]]:
    """Returns the ablation of a run's experts, and what of it was left out.

    Raises one of `DAMAGED` if it cannot be used; FileNotFoundError, which is one of them, if there is none.
    """
    found, left_out = folder.read_ablation()
    if found.domains != domains:
        raise ValueError("it is of other domains than the evaluation")
    return found, left_out


def paired_losses(runs: Sequence[Sequence[Evaluation]]) -> tuple[Floats, Integers, Integers | None]:
    """Returns the sequence losses [O, I, N] of O runs under I seeds, and domain and cluster of each sequence [N].

    All of them were evaluated on the same sequences, so that the clusters of one are those of all: None where none has
    them. Sequences without a domain are left out.
    """
    evaluations = [evaluation for run in runs for evaluation in run]
    domain_N = evaluations[0].sequence_domain_N
    labelled_N = domain_N >= 0
    losses_OIN = np.stack([[evaluation.sequence_loss_N[labelled_N] for evaluation in run] for run in runs])
    clusters = next((e.sequence_cluster_N for e in evaluations if e.sequence_cluster_N is not None), None)
    return losses_OIN, domain_N[labelled_N], None if clusters is None else clusters[labelled_N]
