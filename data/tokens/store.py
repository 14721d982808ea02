"""The token store: all tokens of a mix in one memory-mapped file, contiguous by (split, domain, document).

Files of a store's folder:
    header.json       format, vocabulary, domains, regions, SHA-256 of the other files and of itself; written last
    tokens.bin        uint16 or uint32, little-endian
    documents.npy     int64[documents + 1]: first token of every document, then the end
    token_counts.npy  int64[splits, domains, vocab_size]: how often each piece occurs
    tokenizer.model   sentencepiece
    manifest.json     where the text came from
A store is written into a temporary folder that is renamed when whole; opening checks sizes and hashes.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_testbed.data.errors import DataError
from moe_testbed.data.sources.fetch import file_sha256
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.tokens.tokenizer import load_tokenizer

FORMAT = 2
HEADER, TOKENS, DOCUMENTS, TOKEN_COUNTS, TOKENIZER, MANIFEST = (
    "header.json",
    "tokens.bin",
    "documents.npy",
    "token_counts.npy",
    "tokenizer.model",
    "manifest.json",
)
CHECKED = (TOKENS, DOCUMENTS, TOKEN_COUNTS, TOKENIZER, MANIFEST)
SEAL = "sha256_of_the_rest"
COUNTED_AT_ONCE = 1 << 20

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Region:
    """Holds the documents [first_document, end_document) of one (split, domain), and their tokens."""

    first_document: int
    end_document: int
    first_token: int
    end_token: int


@dataclass(frozen=True)
class Store:
    """An open store. Domains are numbered as in `domains`, documents through all splits and domains.

    labels: domain number -> label that its tokens carry (the number itself, or -1 if the domain is unlabelled).
    regions: split -> one region a domain.
    """

    path: Path
    domains: tuple[str, ...]
    labels: tuple[int, ...]
    vocab_size: int
    regions: Mapping[str, tuple[Region, ...]]
    tokens: Tokens
    document_starts: Int64

    @classmethod
    def open(cls, path: Path) -> "Store":
        """Raises DataError, in one line, if the store is missing, half-written or damaged."""
        header = _read_header(path)
        dtype = np.dtype(header["dtype"])
        _check_files(path, header, dtype)
        regions = {split: tuple(Region(*numbers) for numbers in header["regions"][split]) for split in SPLITS}
        return cls(
            path=path,
            domains=tuple(header["domains"]),
            labels=tuple(header["labels"]),
            vocab_size=header["vocab_size"],
            regions=regions,
            tokens=np.memmap(path / TOKENS, dtype=dtype, mode="r"),
            document_starts=np.load(path / DOCUMENTS),
        )

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Sources, versions, hashes, licences, counts; see `manifest.py`."""
        manifest: dict[str, Any] = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def region(self, split: str, domain: int | str) -> Region:
        """Returns the region of a domain (number or name). Raises DataError if there is no such split or domain."""
        self._check_split(split)
        if isinstance(domain, str):
            if domain not in self.domains:
                raise DataError(f"no domain '{domain}' in {self.path}. Available: {', '.join(self.domains)}")
            domain = self.domains.index(domain)
        return self.regions[split][domain]

    def tokens_of(self, split: str, domain: int | str) -> Tokens:
        """Returns the tokens of one (split, domain), memory-mapped."""
        region = self.region(split, domain)
        return self.tokens[region.first_token : region.end_token]

    def token_counts(self, split: str) -> Int64:
        """int64[domains, vocab_size]: how often each piece occurs in a split. Raises DataError if there is no such."""
        self._check_split(split)
        return np.array(np.load(self.path / TOKEN_COUNTS, mmap_mode="r")[SPLITS.index(split)])

    def document_of(self, token: npt.ArrayLike) -> Int64:
        """Returns the store-wide document number of token positions of any shape."""
        return np.searchsorted(self.document_starts, token, side="right").astype(np.int64) - 1

    def _check_split(self, split: str) -> None:
        if split not in SPLITS:
            raise DataError(f"no split '{split}' in {self.path}. Available: {', '.join(SPLITS)}")


@dataclass(frozen=True)
class DomainTokens:
    """Holds what `write_store` takes for one domain: split -> token arrays, one a document."""

    name: str
    labelled: bool
    documents: Mapping[str, Iterable[Tokens]]


def write_store(
    path: Path, domains: list[DomainTokens], tokenizer: bytes, vocab_size: int, manifest: Mapping[str, Any]
) -> None:
    """Writes a store to `path`, whole or not at all. `manifest` gets the token counts added to its domains."""
    temporary = path.with_name(f".{path.name}.building")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    starts = [0]
    regions: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    with (temporary / TOKENS).open("wb") as file:
        for split in SPLITS:
            for domain in domains:
                first_document, first_token = len(starts) - 1, starts[-1]
                for tokens in domain.documents[split]:
                    file.write(np.ascontiguousarray(tokens, dtype=dtype).data)
                    starts.append(starts[-1] + len(tokens))
                regions[split].append([first_document, len(starts) - 1, first_token, starts[-1]])
        file.flush()
        os.fsync(file.fileno())
    np.save(temporary / DOCUMENTS, np.array(starts, dtype=np.int64))
    written = np.memmap(temporary / TOKENS, dtype=dtype, mode="r")
    counts_XDV = [[_count(written[first:end], vocab_size) for *_, first, end in regions[split]] for split in SPLITS]
    np.save(temporary / TOKEN_COUNTS, np.array(counts_XDV, dtype=np.int64))
    (temporary / TOKENIZER).write_bytes(tokenizer)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False), encoding="utf-8")
    header = {
        "format": FORMAT,
        "vocab_size": vocab_size,
        "dtype": dtype.str,
        "tokens": starts[-1],
        "domains": [domain.name for domain in domains],
        "labels": [number if domain.labelled else -1 for number, domain in enumerate(domains)],
        "regions": regions,
        "sha256": {name: file_sha256(temporary / name) for name in CHECKED},
    }
    header[SEAL] = _seal(header)
    (temporary / HEADER).write_text(json.dumps(header, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _count(tokens: Tokens, vocab_size: int) -> Int64:
    """Counts how often each piece occurs, int64 [vocab_size]; in parts, since numpy copies 8 bytes a token."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), COUNTED_AT_ONCE):
        counts += np.bincount(tokens[start : start + COUNTED_AT_ONCE], minlength=vocab_size)
    return counts


def _read_header(path: Path) -> dict[str, Any]:
    try:
        header: Any = json.loads((path / HEADER).read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is no token store (no {HEADER}): run `moe-testbed data build` on the mix") from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"{HEADER} is no JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, f"{HEADER} is no JSON object")
    if header.get("format") != FORMAT:
        raise DataError(
            f"{path} has store format {header.get('format')}, this version reads {FORMAT}: "
            "delete the folder and build again"
        )
    # Stores of earlier versions have no seal.
    if header.pop(SEAL, seal := _seal(header)) != seal:
        raise _damaged(path, f"{HEADER} is not the one that the store was built with")
    return header


def _seal(header: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of a header without its seal."""
    rest = {key: value for key, value in header.items() if key != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_files(path: Path, header: Mapping[str, Any], dtype: np.dtype[Any]) -> None:
    size = (path / TOKENS).stat().st_size if (path / TOKENS).is_file() else 0
    if size != header["tokens"] * dtype.itemsize:
        raise _damaged(path, f"{TOKENS} has {size:,} bytes, expected {header['tokens'] * dtype.itemsize:,}")
    for name, sha256 in header["sha256"].items():
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        if file_sha256(path / name) != sha256:
            raise _damaged(path, f"{name} is not the one that the store was built with")
    pieces = load_tokenizer(path / TOKENIZER).get_piece_size()
    if pieces != header["vocab_size"]:
        raise _damaged(path, f"the tokenizer has {pieces} pieces, the tokens were written for {header['vocab_size']}")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"the token store {path} is damaged: {reason}; delete the folder and build again")
