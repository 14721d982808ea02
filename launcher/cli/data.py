"""`moe-testbed data`: one function for each of its commands."""

from __future__ import annotations

import sys
from pathlib import Path

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.inspect import check_domains, describe_documents, describe_store
from moe_testbed.data.texts import read_texts
from moe_testbed.data.tokens.store import Store


def build(mix: MixConfig, cache_dir: Path) -> None:
    """Builds the store where it is missing and prints its folder."""
    print(_open(mix, cache_dir).path)


def show(mix: MixConfig, cache_dir: Path) -> None:
    """Prints counts, licences and samples."""
    if mix.evaluation_only:
        print(describe_documents(read_texts(mix, cache_dir, _log)))
    else:
        print(describe_store(_open(mix, cache_dir)))


def check(mix: MixConfig, cache_dir: Path) -> None:
    """Prints how well a linear classifier tells the domains apart."""
    print(check_domains(_open(mix, cache_dir)))


def _open(mix: MixConfig, cache_dir: Path) -> Store:
    return build_store(mix, cache_dir, _log)


def _log(text: str) -> None:
    print(text, file=sys.stderr)
