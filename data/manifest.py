"""The manifest of a store: what the text is, where it came from, under which licence, and how much there is of it."""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from moe_testbed.data.config import MixConfig
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.texts import MixTexts
from moe_testbed.data.tokens.store import FORMAT, DomainTokens


def mix_settings(mix: MixConfig) -> dict[str, Any]:
    """Returns what a mix says besides its domains and decides the content of a store, as JSON values."""
    return mix.model_dump(mode="json", exclude={"domains", "evaluation_only"})


def describe_texts(texts: MixTexts) -> dict[str, Any]:
    """Returns JSON values.

    domains: name -> family, licence, labelled, sources (package, version, sha256, ...), deduplication (see `Figures`),
    splits: split -> documents, bytes (UTF-8).   dropped: name -> reason.
    """
    domains = {
        text.name: {
            "family": text.config.family,
            "licence": text.config.licence,
            "labelled": text.config.labelled,
            "sources": [source.identity() for source in text.config.sources],
            "deduplication": dataclasses.asdict(text.figures),
            "splits": {
                split: {
                    "documents": len(documents),
                    "bytes": sum(len(document.text.encode()) for document in documents),
                }
                for split, documents in text.documents.items()
            },
        }
        for text in texts.domains
    }
    return {"domains": domains, "dropped": dict(texts.dropped)}


def build_manifest(mix: MixConfig, texts: MixTexts, tokens: Sequence[DomainTokens]) -> dict[str, Any]:
    """Returns the manifest of a store: `describe_texts` with the tokens of every split, the mix and the tokenizer."""
    described = describe_texts(texts)
    for domain in tokens:
        for split in SPLITS:
            counts = described["domains"][domain.name]["splits"][split]
            counts["tokens"] = sum(len(document) for document in domain.documents[split])
    return {
        "format": FORMAT,
        "mix": mix_settings(mix),
        "tokenizer": {"type": "sentencepiece BPE, byte fallback", "sentencepiece": version("sentencepiece")},
        **described,
    }
