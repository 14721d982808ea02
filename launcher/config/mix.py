"""Loads a file of the data by itself: a mix, as `moe-testbed data` takes it, or a probing task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_testbed.data.config import MixConfig
from moe_testbed.data.probes.config import TaskConfig
from moe_testbed.data.probes.readers import LabelledReader, labelled_reader_kinds
from moe_testbed.data.probes.splits import Split, split_kinds
from moe_testbed.data.readers import Reader, reader_kinds
from moe_testbed.data.sources import Source, source_kinds
from moe_testbed.launcher.config.messages import Variants, validate
from moe_testbed.launcher.config.yaml_tree import Rules, read_layers

VARIANTS: Variants = {
    Source: lambda options, _: source_kinds.get(options["kind"]),
    Reader: lambda options, _: reader_kinds.get(options["kind"] if isinstance(options, dict) else options),
}
TASK_VARIANTS: Variants = {
    **VARIANTS,
    LabelledReader: lambda options, _: labelled_reader_kinds.get(
        options["kind"] if isinstance(options, dict) else options
    ),
    Split: lambda options, _: split_kinds.get(options["kind"] if isinstance(options, dict) else options),
}


def load_mix(path: str | Path, overrides: Iterable[str] = ()) -> MixConfig:
    """Returns the mix in a YAML file, under overrides like ``vocab_size=4096``; needs no torch. Raises ConfigError."""
    return validate(MixConfig, read_layers(path, overrides, Rules()), VARIANTS)


def load_task(name: str, overrides: Iterable[str] = ()) -> TaskConfig:
    """Returns a probing task under overrides like ``limits.train=1000``; needs no torch. Raises ConfigError.

    Args:
        name: a YAML file, or the name of one that comes with the package, such as ``brown_pos``.
    """
    path = name if Path(name).suffix in (".yaml", ".yml") else f"configs/probes/{name}.yaml"
    return validate(TaskConfig, read_layers(path, overrides, Rules()), TASK_VARIANTS)
