"""Labelled readers: each turns a document into the labelled texts of a probing task.

A new one is one file here, one import line below, and its name in `__all__`.
"""

from moe_testbed.data.probes.base import LabelledReader, labelled_reader_kinds
from moe_testbed.data.probes.readers.brown import BrownGenre, BrownTags
from moe_testbed.data.probes.readers.conllu import Conllu
from moe_testbed.data.probes.readers.corrected_text import CorrectedText, CorrectedTextErrors
from moe_testbed.data.probes.readers.labelled_lines import LabelledLines
from moe_testbed.data.probes.readers.licence_category import LicenceCategory
from moe_testbed.data.probes.readers.python_tokens import PythonTokens
from moe_testbed.data.probes.readers.stripped_marks import StrippedMarks
from moe_testbed.data.probes.readers.tune_metre import TuneMetre
from moe_testbed.data.probes.readers.verse_pairs import VersePairs

__all__ = [
    "BrownGenre",
    "BrownTags",
    "Conllu",
    "CorrectedText",
    "CorrectedTextErrors",
    "LabelledLines",
    "LabelledReader",
    "LicenceCategory",
    "PythonTokens",
    "StrippedMarks",
    "TuneMetre",
    "VersePairs",
    "labelled_reader_kinds",
]
