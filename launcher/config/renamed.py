"""Keys of an experiment that had another name once: configs and run folders that are older than the name still load.

The table is all there is of the old names. It is applied to each layer of a config as it is read, so that whatever
stands above sees the new names only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_testbed.launcher.config.yaml_text import Keys

RENAMED: Mapping[Keys, str] = {
    ("statistics",): "probe",
    ("examination",): "ablation",
    ("routing", "pool"): "pooling",
}
"""Old place -> the key's new name. The keys above it are new ones."""


def new_keys(keys: Keys) -> Keys:
    """Returns where a key that was at this place once is today."""
    found: Keys = ()
    for key in keys:
        found = (*found, RENAMED.get((*found, key), key))
    return found


def with_new_names(config: Mapping[str, Any], at: Keys = ()) -> dict[str, Any]:
    """Returns a run's config as plain values, its keys under the names of today.

    It is for files that are read without trust: of an old key beside its new one, the new one is taken.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        place = new_keys((*at, key))
        if place[-1] == key or place[-1] not in config:
            result[place[-1]] = with_new_names(value, place) if isinstance(value, Mapping) else value
    return result
