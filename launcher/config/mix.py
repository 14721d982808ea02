"""Loads a mix file by itself, as `moe-testbed data` takes it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_testbed.data.config import MixConfig
from moe_testbed.data.readers import Reader, reader_kinds
from moe_testbed.data.sources import Source, source_kinds
from moe_testbed.launcher.config.messages import Variants, validate
from moe_testbed.launcher.config.yaml_tree import Rules, read_layers

VARIANTS: Variants = {
    Source: lambda options, _: source_kinds.get(options["kind"]),
    Reader: lambda options, _: reader_kinds.get(options["kind"] if isinstance(options, dict) else options),
}


def load_mix(path: str | Path, overrides: Iterable[str] = ()) -> MixConfig:
    """Returns the mix in a YAML file, under overrides like ``vocab_size=4096``; needs no torch. Raises ConfigError."""
    return validate(MixConfig, read_layers(path, overrides, Rules()), VARIANTS)
