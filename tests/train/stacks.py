"""What an untrained model of an encoder and a decoder does with the evaluated sequences: as the launcher counts it, and
token by token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run.records import MoELayers
from moe_testbed.launcher.train.engine import build_model
from moe_testbed.launcher.train.evaluation import Evaluator, evaluation_values
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import InputMaker

ALONE = Ranks(0, 1, torch.device("cpu"), None)
Token = tuple[str, int, int, tuple[int, ...]]
"""Stack, layer in it, domain, experts."""


def evaluate(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """The arrays of an evaluation, and its values in the metrics file."""
    experiment, store, sequences = _setting(config)
    found = Evaluator(experiment, sequences, ALONE).run(build_model(experiment, store, ALONE), step=0)
    return found.arrays(), evaluation_values(found, MoELayers.of_model(experiment.model))


def tokens_naively(config: dict[str, Any]) -> Counter[Token]:
    """How often a token of a domain got these experts in a layer, one sequence at a time."""
    experiment, store, sequences = _setting(config)
    model = build_model(experiment, store, ALONE).eval()
    found: Counter[Token] = Counter()
    for share in sequences.shares(ALONE, 1, 0):
        domain = int(sequences.domain_N[int(share.numbers_B[0])])
        with torch.no_grad():
            layers = model(share.context, share.targets_BL).layers
        texts = {"decoder": share.context}
        if experiment.model.architecture == "encoder":
            texts = {"encoder": share.context}
        elif share.context.encoder is not None:
            texts = {"encoder": share.context.encoder, "decoder": share.context}
        # Each stack reads a text of its own, and its layers follow one another.
        each = len(layers) // len(texts)
        for number, (stack, text) in enumerate(texts.items()):
            valid = [True] * text.token_ids_BL.numel() if text.valid_T is None else text.valid_T.tolist()
            for layer in range(each):
                decided = layers[number * each + layer].decision.expert_ids_TK.tolist()
                for experts, is_token in zip(decided, valid, strict=True):
                    if is_token:
                        found[stack, layer, domain, tuple(experts)] += 1
    return found


def _setting(config: dict[str, Any]) -> tuple[ExperimentConfig, Any, EvaluationSet]:
    experiment = ExperimentConfig.model_validate(config)
    store = build_store(experiment.data.mix, Path(experiment.data.cache_dir), lambda _: None)
    sequences = EvaluationSet.of(
        store, "validation", experiment.data.sequence_length, 5, InputMaker.for_evaluation(experiment, store)
    )
    return experiment, store, sequences
