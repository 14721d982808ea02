"""From a mix file to a token store: fetch, read, de-duplicate, split, fit a tokenizer, tokenise, write."""

import time
from itertools import accumulate
from pathlib import Path

from filelock import FileLock

from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DISK_FULL, DataError
from moe_testbed.data.loading import fingerprint, tokenise
from moe_testbed.data.manifest import build_manifest, mix_settings
from moe_testbed.data.splits import SPLITS, TRAIN
from moe_testbed.data.texts import DomainText, Log, read_texts, refuse_training
from moe_testbed.data.tokens.store import DomainTokens, Store, write_store
from moe_testbed.data.tokens.tokenizer import train_tokenizer


def store_path(mix: MixConfig, cache_dir: Path) -> Path:
    """Returns the folder of the mix's store. Its name has the hash of all that decides the content.

    Weights are left out: they steer the sampler, not the store. So is that a domain is not optional, of which older
    stores do not speak.
    """
    domains = []
    for name, domain in mix.domains.items():
        settings = domain.model_dump(mode="json", exclude={"weight", "sources"})
        if not domain.optional or mix.strict:
            del settings["optional"]
        domains.append([name, settings, [source.identity() for source in domain.sources]])
    return cache_dir / "stores" / f"{mix.name}-{fingerprint(mix_settings(mix), domains)}"


def build_store(mix: MixConfig, cache_dir: Path, log: Log) -> Store:
    """Returns the mix's token store, building it first if it is not there yet.

    Safe to call from several processes at once: one builds, the others wait. Whatever a killed build had finished
    (downloads, reading, tokens) is found again in cache_dir. An optional domain that cannot be had is left out with a
    message and noted in the manifest. Raises DataError, also for a mix that is for evaluation only.
    """
    refuse_training(mix)
    path = store_path(mix, cache_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if not path.exists():
            try:
                _build(mix, cache_dir, path, log)
            except OSError as error:
                if error.errno not in DISK_FULL:
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
    texts = read_texts(mix, cache_dir, log)
    log(f"fitting the tokenizer ({mix.vocab_size} pieces)")
    tokenizer = train_tokenizer(
        {domain.name: [document.text for document in domain.documents[TRAIN]] for domain in texts.domains},
        mix.vocab_size,
        mix.tokenizer_bytes_per_domain,
        mix.tokenizer_character_share,
    )
    log("tokenising")
    encoded = _encode(texts.domains, tokenizer, cache_dir)
    manifest = build_manifest(mix, texts, encoded)
    write_store(path, encoded, tokenizer, mix.vocab_size, manifest)
    log(f"built {path} in {time.perf_counter() - started:.0f} s")


def _encode(domains: list[DomainText], tokenizer: bytes, cache_dir: Path) -> list[DomainTokens]:
    """Tokenises all documents in one go and deals the tokens back out to domains and splits."""
    model = cache_dir / "datasets" / f"tokenizer-{fingerprint(tokenizer.hex())}.model"
    model.parent.mkdir(parents=True, exist_ok=True)
    model.write_bytes(tokenizer)
    groups = [domain.documents[split] for domain in domains for split in SPLITS]
    tokens = tokenise([document.text for group in groups for document in group], model, cache_dir)
    ends = list(accumulate(map(len, groups)))
    parts = iter([tokens[end - len(group) : end] for group, end in zip(groups, ends, strict=True)])
    return [
        DomainTokens(domain.name, domain.config.labelled, {split: next(parts) for split in SPLITS})
        for domain in domains
    ]
