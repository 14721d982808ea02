"""Makes of any name a key that a tracking store takes, and never one key of two names. Nothing here knows MLflow.

MLflow takes letters and digits of every script, and ``_ - . : /`` and spaces. It refuses the marks of some scripts,
other punctuation, and what would be another path if it were one, such as ``a//b``.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from moe_testbed.launcher.tracking.values import as_text

MAX_KEY_LENGTH = 250
_MAX_FILE_NAME_BYTES = 200
_PLAIN_LENGTH = 90
_REFUSED = re.compile(r"[^\w\-. :/]")


def key_of(name: str, keys: Collection[str] = (), slashes: int | None = None) -> str:
    """Returns the key of a name: the name itself if MLflow takes it, or else one made of it that ends in a digest.

    Args:
        keys: the others of the same run. A key that differs from one of them in case or accents only gets a digest too,
            since databases such as MySQL, and some file systems, hold the two for one.
        slashes: how many stay, where every key is a file and ``a`` and ``a/b`` exclude each other; the others become
            dots. None: all stay.
    """
    key = _allowed(name, slashes)
    if key in keys or _folded(key) not in {_folded(other) for other in keys}:
        return key
    return _with_digest(key, name)


def plain_key(key: str) -> str:
    """Returns a short key in ASCII for one that a store refuses although this version of MLflow takes it."""
    return _with_digest(re.sub(r"[^A-Za-z0-9_\-. /]", "_", key)[:_PLAIN_LENGTH], key)


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns a nested config as dotted keys with text values. Two values never have one key."""
    flat: dict[str, str] = {}
    for path, value in _leaves(config, ()):
        key = key_of(".".join(path), flat)
        flat[_with_digest(key, repr(path)) if key in flat else key] = as_text(value)
    return flat


def _leaves(config: Mapping[str, Any], path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    found: list[tuple[tuple[str, ...], Any]] = []
    for key, value in config.items():
        inner = (*path, str(key))
        found += _leaves(value, inner) if isinstance(value, Mapping) and value else [(inner, value)]
    return found


def _allowed(name: str, slashes: int | None) -> str:
    composed = unicodedata.normalize("NFC", name) if _REFUSED.search(name) else name
    key = "/".join("_" if part in ("", ".", "..") else part for part in _REFUSED.sub("_", composed).split("/"))
    short = key[:MAX_KEY_LENGTH]
    if slashes is not None:
        *outer, last = key.split("/", slashes)
        key = "/".join([*outer, last.replace("/", ".")])
        short = key.encode()[:_MAX_FILE_NAME_BYTES].decode(errors="ignore")
    return name if short == name else _with_digest(short, name)


def _with_digest(key: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{key[: MAX_KEY_LENGTH - 9]}-{digest}"


@lru_cache(maxsize=4096)
def _folded(key: str) -> str:
    """Returns what a database that ignores case and accents sees of a key."""
    decomposed = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", key).casefold())
    return "".join(character for character in decomposed if not unicodedata.combining(character))
