"""Files of records, one text field of which is a document: read record by record, whatever their size."""

from moe_testbed.data.readers.records.delimited import Csv, Tsv
from moe_testbed.data.readers.records.json_lines import JsonLines
from moe_testbed.data.readers.records.tables import Arrow, Parquet

__all__ = ["Arrow", "Csv", "JsonLines", "Parquet", "Tsv"]
