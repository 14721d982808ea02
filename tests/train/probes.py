"""The probe of an untrained model, as the launcher runs it and in Python's numbers: what the tests' children do.

Shape legend: Y MoE layers, D domains, E experts, L positions.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, build_sampler
from moe_testbed.launcher.train.probe import Probe
from moe_testbed.routing.records import NO_EXPERT


def probe_at_the_start(config: dict[str, Any]) -> dict[str, Any]:
    """The experts of the probe under the untrained model."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    size = dist.get_world_size()
    ranks = Ranks(dist.get_rank(), size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    held_out = EvaluationSet.of(store, "validation", experiment.data.sequence_length, 5)
    return Probe(experiment, held_out, ranks).run(build_model(experiment, store, ranks), 0).arrays()


def probe_naively(config: dict[str, Any]) -> list[list[list[int]]]:
    """The same one sequence at a time: experts of each token in each layer."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    model = build_model(experiment, store, Ranks(0, 1, torch.device("cpu"), None)).eval()
    held_out = EvaluationSet.of(store, "validation", experiment.data.sequence_length, 5)
    layers: list[list[list[int]]] = [[] for _ in range(experiment.model.num_layers)]
    for number in range(len(store.domains) * experiment.probe.sequences_per_domain):
        rows = np.array([number])
        output = model(*LANGUAGE_MODELLING(held_out.rows, rows, 0, torch.device("cpu")).arguments)
        for layer, routing in zip(layers, output.layers, strict=True):
            layer += [[e for e in ids if e != NO_EXPERT] for ids in routing.decision.expert_ids_TK.tolist()]
    return layers


def count_the_first_step(config: dict[str, Any]) -> Counter[tuple[int, int, int]]:
    """(layer, domain, expert) -> assignments of the labelled tokens of the first batch, counted in Python."""
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    model = build_model(experiment, store, Ranks(0, 1, torch.device("cpu"), None))
    batch = build_sampler(experiment, store).batch(0)
    context, targets_BL = LANGUAGE_MODELLING(batch, slice(None), 0, torch.device("cpu")).arguments
    counts: Counter[tuple[int, int, int]] = Counter()
    for y, routing in enumerate(model(context, targets_BL).layers):
        for domain, experts in zip(
            context.domain_BL.flatten().tolist(), routing.decision.expert_ids_TK.tolist(), strict=True
        ):
            counts.update((y, domain, e) for e in experts if domain >= 0)
    return counts
