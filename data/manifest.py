"""The manifest of a store: what the text is, where it came from, under which licence, and how much there is of it."""

import dataclasses
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from moe_testbed.data.config import MixConfig
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.texts import MixTexts
from moe_testbed.data.tokens.store import FORMAT, DomainTokens

LATER = ("max_document_share", "max_bad_records")


def mix_settings(mix: MixConfig) -> dict[str, Any]:
    """Returns what a mix says besides its domains and decides the content of a store, as JSON values.

    Settings that came later are left out where they have their defaults, so that older stores are found again.
    """
    later = {name for name in LATER if getattr(mix, name) == type(mix).model_fields[name].default}
    return mix.model_dump(mode="json", exclude={"domains", "evaluation_only", *later})


def describe_texts(texts: MixTexts) -> dict[str, Any]:
    """Returns JSON values.

    domains: name -> family, licence, labelled, sources (package, version, sha256, ...), deduplication (see `Figures`),
    splits: split -> documents, bytes (UTF-8); and, where there is something to tell, left_out: records that could not
    be read, documents that were mended or cut, and the bytes cut off.   dropped: name -> reason.
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
            **({"left_out": left_out} if (left_out := text.left_out()) else {}),
        }
        for text in texts.domains
    }
    return {"domains": domains, "dropped": dict(texts.dropped)}


def tokens_per_byte(domain: Mapping[str, Any]) -> float:
    """Returns how many tokens a byte of a domain makes; by it, text that was not tokenised is counted in tokens."""
    splits = domain["splits"].values()
    return float(sum(split["tokens"] for split in splits) / max(1, sum(split["bytes"] for split in splits)))


def build_manifest(mix: MixConfig, texts: MixTexts, tokens: Sequence[DomainTokens]) -> dict[str, Any]:
    """Returns the manifest of a store: `describe_texts` with the tokens of every split, the mix and the tokenizer."""
    described = describe_texts(texts)
    for domain in tokens:
        about = described["domains"][domain.name]
        for split in SPLITS:
            about["splits"][split]["tokens"] = sum(len(document) for document in domain.documents[split])
        if "cut_bytes" in about.get("left_out", {}):
            about["left_out"]["cut_tokens"] = round(about["left_out"]["cut_bytes"] * tokens_per_byte(about))
    return {
        "format": FORMAT,
        "mix": mix_settings(mix),
        "tokenizer": {"type": "sentencepiece BPE, byte fallback", "sentencepiece": version("sentencepiece")},
        **described,
    }
