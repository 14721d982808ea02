"""What was read of a domain, on disk, so that a build that is cut off need not read it again."""

import json
import os
import zipfile
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_testbed.data.deduplication import DIGEST_BYTES, Cuts, Figures
from moe_testbed.data.documents import Document
from moe_testbed.data.reading.domain import Reading
from moe_testbed.data.sources.tally import Tally


def save_reading(reading: Reading, path: Path) -> None:
    """Writes what was read to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    strings = [text.encode() for each in reading.documents for text in (each.text, each.origin, each.separator)]
    counts = json.dumps([asdict(reading.figures), asdict(reading.tally), asdict(reading.cuts)])
    try:
        with temporary.open("wb") as file:
            np.savez(
                file,
                strings=_bytes(b"".join(strings)),
                ends=np.cumsum([len(string) for string in strings], dtype=np.int64),
                counts=_bytes(counts.encode()),
                digests=_bytes(b"".join(reading.digests)),
            )
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_reading(path: Path, max_bad_records: float) -> Reading | None:
    """Returns what `save_reading` wrote; None if there is nothing or if it is damaged.

    max_bad_records: what is allowed now; it decides whether a reading counts, and not what it gives.
    """
    try:
        with np.load(path) as arrays:
            content, counts, digests = (arrays[name].tobytes() for name in ("strings", "counts", "digests"))
            ends = arrays["ends"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    figures, tally, cuts = json.loads(counts)
    strings = (content[start:end].decode() for start, end in pairwise([0, *ends]))
    return Reading(
        [Document(*parts) for parts in zip(strings, strings, strings, strict=True)],
        Figures(**figures),
        Tally(**tally | {"max_bad_records": max_bad_records}),
        Cuts(**cuts),
        {digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)},
    )


def _bytes(content: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(content, np.uint8)
