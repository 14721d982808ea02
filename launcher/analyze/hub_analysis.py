"""Analyses the routing of a model of the Hugging Face hub's format on the passages of a mix."""

from __future__ import annotations

from functools import cached_property
from importlib import metadata
from pathlib import Path

import torch

from moe_testbed.data.manifest import describe_texts
from moe_testbed.data.texts import ALL, MixTexts, labelled_documents, read_texts
from moe_testbed.launcher.analyze.hub_model import import_transformers, load_hub_model
from moe_testbed.launcher.analyze.passages import Passages, Tokens, cut_passages
from moe_testbed.launcher.analyze.recorder import Recorder, active_parameters
from moe_testbed.launcher.analyze.request import Request, Result, log, made_here
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.launcher.run import environment
from moe_testbed.launcher.run.records import Manifest, Summary

SEQUENCES_PER_DOMAIN = 64
SEQUENCE_LENGTH = 512
BATCH_SIZE = 8
CACHE_DIR = Path("data_cache")


class HubAnalysis:
    """Analyses one checkpoint after another on the same passages."""

    def __init__(self, request: Request) -> None:
        import_transformers()
        self.request = request
        self.split = request.split or (ALL if request.mix.evaluation_only else "validation")
        self.length = request.sequence_length or SEQUENCE_LENGTH

    @cached_property
    def texts(self) -> MixTexts:
        return read_texts(self.request.mix, self.request.cache_dir or CACHE_DIR, log)

    @cached_property
    def passages(self) -> Passages:
        documents = labelled_documents(self.texts, self.split)
        return cut_passages(documents, self.length, self.request.sequences_per_domain or SEQUENCES_PER_DOMAIN)

    def __call__(self, name: str) -> Result:
        """Raises CheckpointError, DataError."""
        request = self.request
        passages = self.passages
        loaded = load_hub_model(name, request.tokenizer, request.dtype, request.device)
        recorder = Recorder(
            loaded.model,
            loaded.family,
            passages,
            Tokens(loaded.tokenizer, self.length),
            request.batch_size or BATCH_SIZE,
            request.device,
        )
        routers, model_type = recorder.routers, loaded.model.config.model_type
        dense = sorted(set(range(loaded.model.config.num_hidden_layers)) - {router.layer for router in routers})
        if dense:
            log(f"{name}: dense and left out: block {', '.join(map(str, dense))}")
        try:
            evaluation = recorder.run()
        except torch.OutOfMemoryError as error:
            raise CheckpointError(
                f"{name} ran out of memory on {request.device}; lower --batch-size or --sequence-length, or try "
                "--dtype bfloat16 or --device cpu"
            ) from error
        tokens = evaluation.tokens
        log(
            f"{name}: {tokens:,} tokens of {len(passages.texts):,} passages; padding and special tokens are not counted"
        )
        cut = recorder.cut_shares()
        if any(cut.values()):
            most = max(cut, key=lambda domain: cut[domain])
            log(
                f"{name}: passages of more than {self.length} tokens were cut, most in {most} ({cut[most]:.0%}); "
                "--sequence-length reads more of them"
            )
        return Result(
            description=(
                f"{model_type}, {len(routers)} MoE layers of {recorder.num_experts} experts, top-{recorder.top_k}"
            ),
            evaluation=evaluation,
            config={
                "analysed": name,
                "routing": {"router": {"name": model_type}},
                "evaluation": {"split": self.split, "mix": request.mix.name, "sequence_length": self.length},
                "moe_blocks": [router.layer for router in routers],
                "dense_blocks": dense,
                "model": loaded.model.config.to_dict(),
            },
            summary=Summary(
                parameters=sum(parameter.numel() for parameter in loaded.model.parameters()),
                active_parameters=active_parameters(loaded.model, routers, recorder.top_k),
                evaluated_tokens=tokens,
                tokenizer=recorder.tokens.digest,
                cut_passages=cut,
                dtype=str(loaded.model.dtype).removeprefix("torch."),
                versions=environment.versions() | {"transformers": metadata.version("transformers")},
                **made_here(request.device),
            ),
            manifest=Manifest(
                {"mix": request.mix.model_dump(mode="json", exclude={"domains"}), **describe_texts(self.texts)}
            ),
        )
