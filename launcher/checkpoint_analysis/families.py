"""The former place of `launcher.analyze.families`."""

from moe_testbed.launcher.analyze.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
