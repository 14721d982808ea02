"""The documents of a mix by domain: fetched, read, without duplicates, split by document. Nothing is tokenised here."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_testbed.data.config import DomainConfig, MixConfig
from moe_testbed.data.deduplication import Cuts, Figures
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.loading import fingerprint
from moe_testbed.data.reading.cache import load_reading, save_reading
from moe_testbed.data.reading.domain import Reading, read_domain
from moe_testbed.data.sources.tally import Tally
from moe_testbed.data.splits import SPLITS, split_documents

Log = Callable[[str], None]
ALL = "all"
DOWNLOADS_AT_ONCE = 4
DECIDES_READING = {
    "evaluation_only",
    "max_bytes_per_domain",
    "max_document_share",
    "minimum_document_characters",
    "minimum_paragraph_characters",
}
"""The settings of a mix on which it depends what is kept of a domain."""


@dataclass(frozen=True)
class DomainText:
    """Holds the documents of one domain by split. An evaluation-only mix has one split, `ALL`."""

    name: str
    config: DomainConfig
    documents: dict[str, list[Document]]
    figures: Figures
    tally: Tally
    cuts: Cuts

    def left_out(self) -> dict[str, Any]:
        """Returns, as JSON values, what could not be read and what was cut off; nothing if there was nothing."""
        cuts = {"cut_documents": self.cuts.documents, "cut_bytes": self.cuts.bytes} if self.cuts.documents else {}
        return self.tally.described() | cuts


@dataclass(frozen=True)
class MixTexts:
    """Holds the domains that could be read, and why optional ones could not: dropped domain -> reason."""

    domains: list[DomainText]
    dropped: dict[str, str]


def read_texts(mix: MixConfig, cache_dir: Path, log: Log) -> MixTexts:
    """Fetches and reads all domains. One that is optional and cannot be had is left out with a message.

    Duplicates are removed over all domains before the split. An evaluation-only mix keeps all its documents in their
    order: parallel texts share names and numbers, and worked examples their wording. Raises DataError.
    """
    dropped = _prepare_sources(mix, cache_dir, log)
    digests: set[bytes] = set()
    read_so_far: list[Any] = [mix.model_dump(mode="json", include=DECIDES_READING)]
    domains = []
    for name, config in mix.domains.items():
        if name in dropped:
            continue
        identities = [source.identity() for source in config.sources]
        path = cache_dir / "documents" / f"{fingerprint(read_so_far, identities)}.npz"
        try:
            reading = load_reading(path, mix.max_bad_records)
            if reading is None:
                reading = read_domain(mix, config, digests, cache_dir)
                save_reading(reading, path)
            domain = _domain_text(mix, name, config, reading)
        except DataError as error:
            dropped |= _drop(mix, {name: str(error)}, log)
            continue
        read_so_far.append(identities)
        digests |= reading.digests
        domains.append(domain)
        for line in _told(mix, domain):
            log(line)
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


def _domain_text(mix: MixConfig, name: str, config: DomainConfig, reading: Reading) -> DomainText:
    """Raises DataError if too much could not be read, or too little is there."""
    reading.tally.check()
    if mix.evaluation_only:
        if not reading.documents:
            raise DataError("it has no text: correct its sources")
        splits = {ALL: reading.documents}
    else:
        splits = split_documents(reading.documents, mix.validation_fraction, mix.tuning_fraction)
    return DomainText(name, config, splits, reading.figures, reading.tally, reading.cuts)


def _told(mix: MixConfig, domain: DomainText) -> Iterator[str]:
    """Yields the lines that say what was read of a domain, what is kept of it, and what is not."""
    kept = sum(len(document.text.encode()) for documents in domain.documents.values() for document in documents)
    line = f"{domain.name}: {domain.figures.documents_read:,} documents read, {kept / 1e6:.1f} MB kept"
    if beyond := domain.figures.bytes_kept - kept:
        line += f", {beyond / 1e6:.1f} MB beyond max_bytes_per_domain left out"
    yield line
    if domain.cuts.documents:
        yield (
            f"{domain.name}: only the beginning is kept of documents that are longer than max_document_share = "
            f"{mix.max_document_share:g} allows, {mix.max_document_bytes:,} bytes (documents: "
            f"{domain.cuts.documents:,}, left out of them: {domain.cuts.bytes / 1e6:.1f} MB)"
        )
    for note in domain.tally.notes():
        yield f"{domain.name}: {note}"


def _prepare_sources(mix: MixConfig, cache_dir: Path, log: Log) -> dict[str, str]:
    """Fetches everything, several archives at once. Returns domain -> reason of those to do without."""

    def prepare(domain: DomainConfig) -> str | None:
        try:
            for source in domain.sources:
                source.prepare(cache_dir, log)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        reasons = dict(zip(mix.domains, pool.map(prepare, mix.domains.values()), strict=True))
    return _drop(mix, {name: reason for name, reason in reasons.items() if reason is not None}, log)


def _drop(mix: MixConfig, reasons: dict[str, str], log: Log) -> dict[str, str]:
    """Returns domain -> reason of the domains to do without. Raises DataError if one of them is not optional."""
    needed = [name for name in reasons if mix.strict or not mix.domains[name].optional]
    if needed:
        told = "; ".join(f"domain '{name}' of the mix '{mix.name}': {reasons[name]}" for name in needed)
        raise DataError(
            f"{told} (a mix goes on without a domain only if it has `optional: true`"
            f"{' and the mix is not strict' if mix.strict else ''})"
        )
    for name, reason in reasons.items():
        log(f"domain '{name}' is left out of the mix '{mix.name}', in which it is optional: {reason}")
    return reasons
