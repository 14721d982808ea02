"""The documents of a mix by domain: fetched, read, without duplicates, split by document. Nothing is tokenised here."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from moe_testbed.data.config import DomainConfig, MixConfig
from moe_testbed.data.deduplication import Deduplicator, Figures
from moe_testbed.data.documents import Document, clean_text
from moe_testbed.data.errors import DataError
from moe_testbed.data.loading import documents_of, load_documents
from moe_testbed.data.splits import SPLITS, split_documents

Log = Callable[[str], None]
ALL = "all"
DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class DomainText:
    """Holds the documents of one domain by split. An evaluation-only mix has one split, `ALL`."""

    name: str
    config: DomainConfig
    documents: dict[str, list[Document]]
    figures: Figures


@dataclass(frozen=True)
class MixTexts:
    """Holds the domains that could be read, and why others could not: dropped domain -> reason."""

    domains: list[DomainText]
    dropped: dict[str, str]


def read_texts(mix: MixConfig, cache_dir: Path, log: Log) -> MixTexts:
    """Fetches and reads all domains. One that cannot be read is dropped with a message, unless the mix is strict.

    Duplicates are removed over all domains before the split. An evaluation-only mix keeps all its documents in their
    order: parallel texts share names and numbers, and worked examples their wording. Raises DataError.
    """
    dropped = _prepare_sources(mix, cache_dir, log)
    deduplicator = Deduplicator(mix.minimum_paragraph_characters, mix.minimum_document_characters)
    domains = []
    for name, config in mix.domains.items():
        if name in dropped:
            continue
        figures = Figures()
        try:
            rows = documents_of(load_documents(config, cache_dir, mix.max_bytes_per_domain))
            if mix.evaluation_only:
                splits = {ALL: _whole(rows, figures)}
            else:
                documents = list(deduplicator.filter(rows, figures))
                splits = split_documents(
                    documents, mix.max_bytes_per_domain, mix.validation_fraction, mix.tuning_fraction
                )
        except DataError as error:
            dropped[name] = str(error)
            _drop(mix, name, str(error), log)
            continue
        domains.append(DomainText(name, config, splits, figures))
        log(f"{name}: {figures.documents_read:,} documents read, {figures.bytes_kept / 1e6:.1f} MB kept")
    if not domains:
        raise DataError(f"no domain of the mix '{mix.name}' can be read; first reason: {next(iter(dropped.values()))}")
    return MixTexts(domains, dropped)


def labelled_documents(texts: MixTexts, split: str) -> dict[str, list[Document]]:
    """Returns domain -> documents of one split, or of all (`ALL`). Raises DataError if the mix has no such split."""
    found = {}
    for domain in texts.domains:
        if split == ALL:
            found[domain.name] = [document for documents in domain.documents.values() for document in documents]
        elif split in domain.documents:
            found[domain.name] = domain.documents[split]
        else:
            raise DataError(f"the mix is for evaluation only and has no split '{split}': take the split '{ALL}'")
    return found


def refuse_training(mix: MixConfig) -> None:
    """Raises DataError if the mix is for evaluation only."""
    if mix.evaluation_only:
        raise DataError(
            f"the mix '{mix.name}' is for evaluation only: its texts are too short to train on and are neither "
            f"de-duplicated nor split into {', '.join(SPLITS)}; give it to `moe-testbed analyze --mix`, and train on "
            "another mix"
        )


def _whole(documents: Iterable[Document], figures: Figures) -> list[Document]:
    """Returns all documents that have text, cleaned; adds to `figures`."""
    kept = []
    for document in documents:
        text = clean_text(document.text)
        figures.documents_read += 1
        figures.bytes_read += len(document.text.encode())
        if text:
            figures.documents_kept += 1
            figures.bytes_kept += len(text.encode())
            kept.append(replace(document, text=text))
    if not kept:
        raise DataError("it has no text: correct its sources")
    return kept


def _prepare_sources(mix: MixConfig, cache_dir: Path, log: Log) -> dict[str, str]:
    """Fetches everything, several archives at once. Returns dropped domain -> reason; raises DataError if strict."""

    def prepare(domain: DomainConfig) -> str | None:
        try:
            for source in domain.sources:
                source.prepare(cache_dir, log)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        reasons = dict(zip(mix.domains, pool.map(prepare, mix.domains.values()), strict=True))
    dropped = {name: reason for name, reason in reasons.items() if reason is not None}
    for name, reason in dropped.items():
        _drop(mix, name, reason, log)
    return dropped


def _drop(mix: MixConfig, name: str, reason: str, log: Log) -> None:
    if mix.strict:
        raise DataError(f"domain '{name}' of the mix '{mix.name}': {reason}")
    log(f"domain '{name}' is dropped from the mix '{mix.name}': {reason}")
