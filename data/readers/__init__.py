"""Readers: each turns one file into the texts of documents.

A new reader is one file here, one import line below, and its name in `__all__`.
"""

from moe_testbed.data.readers.abc_tunes import AbcTunes
from moe_testbed.data.readers.annotated_text import AnnotatedText
from moe_testbed.data.readers.base import Reader, Unreadable, WholeFile, reader_kinds
from moe_testbed.data.readers.fasta import Fasta
from moe_testbed.data.readers.html_text import HtmlText
from moe_testbed.data.readers.json_texts import JsonField, JsonKey, JsonLeaves, JsonList, LawTree
from moe_testbed.data.readers.license_text import LicenseText
from moe_testbed.data.readers.line_groups import LineGroups
from moe_testbed.data.readers.plain_text import PlainText
from moe_testbed.data.readers.records import Arrow, Csv, JsonLines, Parquet, Tsv
from moe_testbed.data.readers.source_code import SourceCode
from moe_testbed.data.readers.sqlite_rows import SqliteRows

__all__ = [
    "AbcTunes",
    "AnnotatedText",
    "Arrow",
    "Csv",
    "Fasta",
    "HtmlText",
    "JsonField",
    "JsonKey",
    "JsonLeaves",
    "JsonLines",
    "JsonList",
    "LawTree",
    "LicenseText",
    "LineGroups",
    "Parquet",
    "PlainText",
    "Reader",
    "SourceCode",
    "SqliteRows",
    "Tsv",
    "Unreadable",
    "WholeFile",
    "reader_kinds",
]
