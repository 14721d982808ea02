"""Analyses the routing of one of our runs on its own held-out text, or on another mix in its own tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from moe_testbed.data.manifest import describe_texts
from moe_testbed.data.sources.fetch import file_sha256
from moe_testbed.data.splits import SPLITS, VALIDATION
from moe_testbed.data.texts import ALL, labelled_documents, read_texts
from moe_testbed.data.tokens.store import Store
from moe_testbed.launcher.analyze.own_run import (
    is_own_mix,
    load_model,
    open_run,
    refuse_labels,
    store_of,
)
from moe_testbed.launcher.analyze.request import Request, Result, log, made_here
from moe_testbed.launcher.checkpoint.own_run import OwnRun
from moe_testbed.launcher.config.model_size import size_of
from moe_testbed.launcher.errors import ConfigError
from moe_testbed.launcher.ranks.ranks import Ranks
from moe_testbed.launcher.run import environment
from moe_testbed.launcher.run.records import Manifest, Summary
from moe_testbed.launcher.train.ablated_model import ablate_model
from moe_testbed.launcher.train.evaluation import Evaluator
from moe_testbed.launcher.train.evaluation_set import EvaluationSet
from moe_testbed.launcher.train.inputs import InputMaker


class RunAnalysis:
    """Analyses one run after another."""

    def __init__(self, request: Request) -> None:
        if request.tokenizer is not None:
            raise ConfigError("--tokenizer is for models of the hub's format; a run has its own: leave it out")
        self.request = request
        self.ranks = Ranks(0, 1, request.device, None)

    def __call__(self, name: str) -> Result:
        """Raises CheckpointError, ConfigError, DataError."""
        run = open_run(Path(name), self.request.cache_dir, log, self.request.trust)
        store, split, text_split, manifest = self._text(run)
        config = self._config(run, split)
        held_out = EvaluationSet.of(
            store,
            split,
            config.data.sequence_length,
            config.evaluation.sequences_per_domain,
            InputMaker.for_evaluation(config, store),
        )
        dtype = None if self.request.dtype == "auto" else getattr(torch, self.request.dtype)
        model = load_model(run, dtype, self.ranks)
        evaluation = Evaluator(config, held_out, self.ranks).run(model, run.step)
        ablation = None
        if config.ablation.sequences_per_domain:
            sample = held_out.first(config.ablation.sequences_per_domain)
            ablation = ablate_model(
                model,
                sample,
                evaluation.counts_top_k_YDE,
                config.training.micro_batch_size,
                run.step,
                self.ranks,
            )
        tokens = evaluation.tokens
        log(f"{name}: step {run.step}, {tokens:,} tokens of {len(held_out):,} sequences")
        written = config.model_dump(mode="json")
        written["evaluation"] |= {"split": text_split, "mix": self.request.mix.name}
        return Result(
            description=f"router {config.routing.router.name}, after {run.step} steps of training",
            evaluation=evaluation,
            config={"analysed": str(run.checkpoint), **written},
            summary=Summary(
                **asdict(size_of(model, config.data.sequence_length, config.objective)),
                learned=config.routing.router.learned,
                causal=config.causal,
                evaluated_tokens=tokens,
                tokenizer=file_sha256(run.store.tokenizer_path)[:16],
                versions=environment.versions(),
                **made_here(self.request.device),
            ),
            manifest=Manifest(manifest),
            ablation=ablation,
        )

    def _text(self, run: OwnRun) -> tuple[Store, str, str, dict[str, Any]]:
        """Returns the text as a store, the store's split, the split's name in the mix, and the manifest."""
        request, mix = self.request, self.request.mix
        if is_own_mix(run, mix):
            split: str = request.split or run.config.evaluation.split
            if split == ALL:
                raise ConfigError(
                    f"'{mix.name}' is the run's own mix, which is read split by split: --split {', '.join(SPLITS)}"
                )
            return run.store, split, split, run.store.manifest
        refuse_labels(run, mix)
        cache_dir = request.cache_dir or Path(run.config.data.cache_dir)
        texts = read_texts(mix, cache_dir, log)
        split = request.split or (ALL if mix.evaluation_only else VALIDATION)
        manifest = {"mix": mix.model_dump(mode="json", exclude={"domains"}), **describe_texts(texts)}
        return store_of(labelled_documents(texts, split), run, cache_dir), VALIDATION, split, manifest

    def _config(self, run: OwnRun, split: str) -> Any:
        """Returns the run's config with what the request says; `split` is the store's."""
        request, config = self.request, run.config
        examined = request.examined_sequences
        own_length = config.data.sequence_length
        if request.sequence_length is not None and request.sequence_length > own_length:
            raise ConfigError(
                f"--sequence-length is {request.sequence_length}, but {run.folder} was trained on sequences of "
                f"{own_length}; give at most that"
            )
        return config.model_copy(
            update={
                "data": config.data.model_copy(update={"sequence_length": request.sequence_length or own_length}),
                "training": config.training.model_copy(
                    update={"micro_batch_size": request.batch_size or config.training.micro_batch_size}
                ),
                "ablation": config.ablation
                if examined is None
                else config.ablation.model_copy(update={"sequences_per_domain": examined}),
                "evaluation": config.evaluation.model_copy(
                    update={
                        "split": split,
                        "sequences_per_domain": request.sequences_per_domain or config.evaluation.sequences_per_domain,
                    }
                ),
            }
        )
