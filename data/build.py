"""From a mix file to a token store: fetch, read, de-duplicate, split, fit a tokenizer, tokenise, write."""

import errno
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from filelock import FileLock

from moe_testbed.data.config import DomainConfig, MixConfig
from moe_testbed.data.deduplication import Deduplicator, Figures
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.loading import documents_of, fingerprint, load_documents, tokenise
from moe_testbed.data.manifest import build_manifest
from moe_testbed.data.splits import SPLITS, TRAIN, split_documents
from moe_testbed.data.store import DomainTokens, Store, write_store
from moe_testbed.data.tokenizer import train_tokenizer

Log = Callable[[str], None]
DOWNLOADS_AT_ONCE = 4


@dataclass(frozen=True)
class DomainText:
    """One domain, ready to be tokenised: split -> documents."""

    name: str
    config: DomainConfig
    documents: dict[str, list[Document]]
    figures: Figures


def store_path(mix: MixConfig, cache_dir: Path) -> Path:
    """The folder of the mix's store: its name carries the hash of all that decides the content.

    Weights are left out: they steer the sampler, not the store.
    """
    settings = mix.model_dump(mode="json", exclude={"domains"})
    domains = [
        [name, domain.model_dump(mode="json", exclude={"weight", "sources"}), [s.identity() for s in domain.sources]]
        for name, domain in mix.domains.items()
    ]
    return cache_dir / "stores" / f"{mix.name}-{fingerprint(settings, domains)}"


def build_store(mix: MixConfig, cache_dir: Path, log: Log) -> Store:
    """Returns the mix's token store, building it first if it is not there yet.

    Safe to call from several processes at once: one builds, the others wait. Whatever a killed build had finished
    (downloads, reading, tokens) is found again in cache_dir. A domain that cannot be read is dropped with a message and
    noted in the manifest, unless the mix is strict. Raises DataError.
    """
    path = store_path(mix, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            try:
                _build(mix, cache_dir, path, log)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise DataError(
                    f"the disk of {cache_dir} is full: free some space or choose another cache_dir"
                ) from error
        store = Store.open(path)
    for name, reason in store.manifest["dropped"].items():
        log(f"domain '{name}' is not in this store: {reason}. To try again, delete {path}")
    return store


def _build(mix: MixConfig, cache_dir: Path, path: Path, log: Log) -> None:
    started = time.perf_counter()
    dropped = _prepare_sources(mix, cache_dir, log)
    domains = _read_domains(mix, cache_dir, dropped, log)
    log(f"fitting the tokenizer ({mix.vocab_size} pieces)")
    tokenizer = train_tokenizer(
        {domain.name: [document.text for document in domain.documents[TRAIN]] for domain in domains},
        mix.vocab_size,
        mix.tokenizer_bytes_per_domain,
        mix.tokenizer_character_share,
    )
    log("tokenising")
    encoded = _encode(domains, tokenizer, cache_dir)
    manifest = build_manifest(mix, domains, encoded, dropped)
    write_store(path, encoded, tokenizer, mix.vocab_size, manifest)
    log(f"built {path} in {time.perf_counter() - started:.0f} s")


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


def _read_domains(mix: MixConfig, cache_dir: Path, dropped: dict[str, str], log: Log) -> list[DomainText]:
    """Reads, de-duplicates over all domains, and splits. Adds to `dropped`."""
    deduplicator = Deduplicator(mix.minimum_paragraph_characters, mix.minimum_document_characters)
    domains = []
    for name, config in mix.domains.items():
        if name in dropped:
            continue
        try:
            rows = load_documents(config, cache_dir, mix.max_bytes_per_domain)
            figures = Figures()
            documents = list(deduplicator.filter(documents_of(rows), figures))
            splits = split_documents(documents, mix.max_bytes_per_domain, mix.validation_fraction, mix.tuning_fraction)
        except DataError as error:
            dropped[name] = str(error)
            _drop(mix, name, str(error), log)
            continue
        domains.append(DomainText(name, config, splits, figures))
        log(f"{name}: {figures.documents_read:,} documents read, {figures.bytes_kept / 1e6:.1f} MB without duplicates")
    if not domains:
        raise DataError(f"no domain of the mix '{mix.name}' can be read; first reason: {next(iter(dropped.values()))}")
    return domains


def _drop(mix: MixConfig, name: str, reason: str, log: Log) -> None:
    if mix.strict:
        raise DataError(f"domain '{name}' of the mix '{mix.name}': {reason}")
    log(f"domain '{name}' is dropped from the mix '{mix.name}': {reason}")


def _encode(domains: list[DomainText], tokenizer: bytes, cache_dir: Path) -> list[DomainTokens]:
    """Tokenises all documents in one go and deals the tokens back out to domains and splits."""
    model = cache_dir / "datasets" / f"tokenizer-{fingerprint(tokenizer.hex())}.model"
    model.write_bytes(tokenizer)
    groups = [domain.documents[split] for domain in domains for split in SPLITS]
    tokens = tokenise([document.text for group in groups for document in group], model, cache_dir)
    ends = list(accumulate(map(len, groups)))
    parts = iter([tokens[end - len(group) : end] for group, end in zip(groups, ends, strict=True)])
    return [
        DomainTokens(domain.name, domain.config.labelled, {split: next(parts) for split in SPLITS})
        for domain in domains
    ]
