"""The manifest of a store: what the text is, where it came from, under which licence, and how much there is of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moe_testbed.data.config import MixConfig
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.store import FORMAT, DomainTokens

if TYPE_CHECKING:
    from moe_testbed.data.build import DomainText


def build_manifest(
    mix: MixConfig, texts: Sequence["DomainText"], tokens: Sequence[DomainTokens], dropped: Mapping[str, str]
) -> dict[str, Any]:
    """Returns JSON values.

    domains: name -> family, licence, labelled, sources (package, version, sha256, ...), deduplication (see `Figures`),
    splits: split -> documents, bytes (UTF-8), tokens.   dropped: name -> reason.
    """
    domains = {}
    for text, encoded in zip(texts, tokens, strict=True):
        splits = {}
        for split in SPLITS:
            documents = text.documents[split]
            splits[split] = {
                "documents": len(documents),
                "bytes": sum(len(document.text.encode()) for document in documents),
                "tokens": sum(len(document) for document in encoded.documents[split]),
            }
        domains[text.name] = {
            "family": text.config.family,
            "licence": text.config.licence,
            "labelled": text.config.labelled,
            "sources": [source.identity() for source in text.config.sources],
            "deduplication": dataclasses.asdict(text.figures),
            "splits": splits,
        }
    settings = mix.model_dump(mode="json", exclude={"domains"})
    return {
        "format": FORMAT,
        "mix": settings,
        "tokenizer": {"type": "sentencepiece BPE, byte fallback", "sentencepiece": version("sentencepiece")},
        "domains": domains,
        "dropped": dict(dropped),
    }
