"""Objectives: what a model reads of a sequence, and what it is to predict.

A new objective is one file here, one import line below, its name in `__all__`, and a YAML that uses it.
"""

from moe_testbed.data.objectives.base import NO_TARGET, Objective, Reading, SpecialIds, Task, objective_names
from moe_testbed.data.objectives.denoising import Denoising
from moe_testbed.data.objectives.masked import Masked
from moe_testbed.data.objectives.next_token import NextToken
from moe_testbed.data.objectives.prefix import Prefix

__all__ = [
    "NO_TARGET",
    "Denoising",
    "Masked",
    "NextToken",
    "Objective",
    "Prefix",
    "Reading",
    "SpecialIds",
    "Task",
    "objective_names",
]
