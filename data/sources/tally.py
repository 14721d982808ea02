"""How many records of a domain could be read, and which could not."""

from dataclasses import dataclass, field
from typing import Any

from moe_testbed.data.errors import DataError

NAMED = 5
ENOUGH_TO_JUDGE = 100


@dataclass
class Tally:
    """Counts the records of one domain: what its reader takes one by one, lines, rows or files.

    max_bad_records: share of the records that may be unreadable.
    unreadable: records that were passed over; the first NAMED of them, with the reason, in `named`.
    mended: documents in which half of a surrogate pair, which is no character, was replaced; `first_mended` is one.
    """

    max_bad_records: float
    records: int = 0
    unreadable: int = 0
    mended: int = 0
    first_mended: str = ""
    named: list[str] = field(default_factory=list)

    def skip(self, record: str) -> None:
        """Counts a record that cannot be read. Raises DataError as soon as it is plain that they are too many."""
        self.records += 1
        self.unreadable += 1
        if len(self.named) < NAMED:
            self.named.append(record)
        if self.unreadable >= ENOUGH_TO_JUDGE and self.unreadable > self.records * max(0.5, self.max_bad_records):
            raise self._too_many()

    def mend(self, origin: str) -> None:
        """Counts a document in which characters were replaced."""
        self.mended += 1
        self.first_mended = self.first_mended or origin

    def check(self) -> None:
        """Raises DataError if more records than allowed cannot be read."""
        if self.unreadable > self.records * self.max_bad_records:
            raise self._too_many()

    def notes(self) -> list[str]:
        """Returns what a user is told, a line each; nothing if all is well."""
        notes = []
        if self.unreadable:
            more = "; ..." if self.unreadable > len(self.named) else ""
            notes.append(
                f"{self.unreadable:,} of {self.records:,} records cannot be read and are left out: "
                f"{'; '.join(self.named)}{more}"
            )
        if self.mended:
            notes.append(
                f"half of a surrogate pair, which is no character, is replaced by U+FFFD (documents: {self.mended:,}, "
                f"the first in {self.first_mended})"
            )
        return notes

    def described(self) -> dict[str, Any]:
        """Returns the counts for the manifest; nothing if all is well."""
        described: dict[str, Any] = {}
        if self.unreadable:
            described |= {"records": self.records, "unreadable_records": self.unreadable}
            described |= {"first_unreadable": self.named}
        if self.mended:
            described |= {"mended_documents": self.mended}
        return described

    def _too_many(self) -> DataError:
        more = "; ..." if self.unreadable > len(self.named) else ""
        return DataError(
            f"{self.unreadable:,} of {self.records:,} records cannot be read, and max_bad_records = "
            f"{self.max_bad_records:g} allows a share of no more than that: {'; '.join(self.named)}{more}: correct the "
            "reader or its options, mend the files, or raise max_bad_records"
        )
