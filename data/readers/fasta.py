"""Sequences in FASTA format."""

from collections.abc import Iterator

from pydantic import Field

from moe_testbed.data.readers.base import WholeFile, reader_kinds


@reader_kinds.register("fasta")
class Fasta(WholeFile):
    """Makes documents of so many records each; a record is a paragraph.

    The header lines are dropped: they number the records, and two records of the same sequence must look the same to
    the de-duplication.
    """

    kind: str = "fasta"
    records_per_document: int = Field(default=50, ge=1)

    def texts(self, content: bytes) -> Iterator[str]:
        records = ("\n" + content.decode("ascii").replace("\r\n", "\n")).split("\n>")[1:]
        sequences = [record.partition("\n")[2].strip() for record in records]
        if not sequences:
            raise ValueError("no record: a FASTA record begins with '>'")
        for start in range(0, len(sequences), self.records_per_document):
            yield "\n\n".join(sequences[start : start + self.records_per_document])
