"""Corpora: files drawn at random whose documents are known, since they are written from them. What is read is the same.

Nothing of the product reads or writes them here; Python's own json, csv and codecs do.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DataError
from moe_testbed.data.texts import ALL, read_texts
from tests.campaign.trials import Part, Trial, without_one

PIECES = (
    "word", "Łódź", "naïve", "Ελλάδα", "漢字", "🙂", "e\u0301", "\u200b", "a\tb", "\u2028", "\x85",
    "\u00a0", "'", '"', ",", ";", "NA", "null",
    "2024-01-01", "1e5", "007", "\\n", "{", "</p>", "#", "\ufeff", "\x0b", "\x1c", "…", "\ufffd", "x" * 200,
)  # fmt: skip
BREAKS = (" ", " ", " ", " ", "\n", "\n\n", "\n \n\n", "\r\n", "\r")
BAD = (
    b"{",
    b'{"text": null}',
    b"[1, 2]",
    b'{"other": "x"}',
    b'{"text": 3}',
    b'{"text": ["a"]}',
    b'"text"',
    b"\xff{",
    b"NaN",
)
ENCODINGS = {"utf-8": b"", "utf-8-sig": b"", "utf-16": b"", "utf-32": b"", "utf-16-be": codecs.BOM_UTF16_BE}
COMPRESSIONS = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
KINDS = ("plain_text", "jsonl", "csv", "tsv")


class Corpora(Part):
    """A trial is the files of one domain: of each its kind, encoding, compression and texts, and its bad records."""

    name = "corpora"
    number = 1_000

    def draw(self, generator: random.Random) -> Trial:
        kind = generator.choice(KINDS)
        texts = [_text(generator) for _ in range(generator.choice((1, 2, 5, 30)))]
        files = []
        while texts:
            taken = [
                texts.pop() for _ in range(min(len(texts), 1 if kind == "plain_text" else generator.randint(1, 12)))
            ]
            files.append(
                {
                    "encoding": generator.choice(("utf-8", "utf-8", *ENCODINGS)),
                    "compression": generator.choice(("", "", *COMPRESSIONS)),
                    "line_end": generator.choice(("\n", "\r\n")),
                    "last_end": generator.random() < 0.8,
                    "blank": generator.random() < 0.2,
                    "escaped": generator.random() < 0.3,
                    "field": generator.choice(("text", "text", "meta.text")) if not files else files[0]["field"],
                    "texts": taken,
                    "bad": [],
                }
            )
        if kind == "jsonl" and generator.random() < 0.3:
            # Bytes that are no text cannot stand between others of another encoding.
            file = generator.choice(files)
            file["encoding"] = "utf-8"
            bad = generator.choice(BAD).decode("latin-1")
            file["bad"] = [[generator.randint(0, len(file["texts"])), bad] for _ in range(generator.choice((1, 2)))]
        return {"kind": kind, "tolerant": generator.random() < 0.7, "files": files}

    def smaller(self, trial: Trial) -> Iterator[Trial]:
        for files in without_one(trial["files"]):
            if files:
                yield {**trial, "files": files}
        for number, file in enumerate(trial["files"]):
            for texts in without_one(file["texts"]):
                if trial["kind"] != "plain_text" or texts:
                    yield _with_file(trial, number, {**file, "texts": texts})
            for at, text in enumerate(file["texts"]):
                for half in (text[: len(text) // 2], text[len(text) // 2 :]):
                    if half != text:
                        yield _with_file(
                            trial, number, {**file, "texts": [*file["texts"][:at], half, *file["texts"][at + 1 :]]}
                        )

    def fault(self, trial: Trial) -> str | None:
        folder, before = self.folder / "trial", Path.cwd()
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for number, file in enumerate(trial["files"]):
            content = COMPRESSIONS[file["compression"]](_content(trial["kind"], file))
            (folder / f"{number:03}.data").write_bytes(content)
        os.chdir(folder)
        try:
            return self._fault(trial)
        finally:
            os.chdir(before)

    def _fault(self, trial: Trial) -> str | None:
        expected = [_cleaned(text) for file in trial["files"] for text in file["texts"]]
        expected = [text for text in expected if text]
        bad = [line for file in trial["files"] for _, line in file["bad"]]
        reader: Any = (
            trial["kind"]
            if trial["kind"] == "plain_text"
            else {"kind": trial["kind"], "field": trial["files"][0]["field"]}
        )
        source = {"kind": "files", "glob": "*.data", "reader": reader}
        mix: dict[str, Any] = {"name": "trial", "domains": {"one": {"sources": [source]}}, "evaluation_only": True}
        mix["max_bad_records"] = 0.99 if trial["tolerant"] else 0.0
        try:
            texts = read_texts(MixConfig.model_validate(mix), Path("cache"), lambda _: None)
        except DataError as error:
            if "\n" in str(error):
                return f"the message is not one line: {error}"
            if not expected or (bad and not trial["tolerant"]):
                named = not bad or not expected or re.search(r"\d{3}\.data", str(error))
                return None if named else f"the message names no file: {error}"
            return f"it is refused: {error}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        if bad and not trial["tolerant"]:
            return f"bad records are passed over in silence: {bad}"
        (domain,) = texts.domains
        found = [document.text for document in domain.documents[ALL]]
        if found != expected:
            first = next(
                (pair for pair in zip(found, expected, strict=False) if pair[0] != pair[1]), (len(found), len(expected))
            )
            return f"another text is read: {first[0]!r} instead of {first[1]!r}"
        return None


def _text(generator: random.Random) -> str:
    parts = [generator.choice(PIECES) + generator.choice(BREAKS) for _ in range(generator.choice((0, 1, 3, 20, 200)))]
    return "".join(parts)


def _content(kind: str, file: dict[str, Any]) -> bytes:
    """Returns the bytes of a file, before it is compressed."""
    mark = ENCODINGS[file["encoding"]]
    if kind == "plain_text":
        return bytes(mark + file["texts"][0].encode(file["encoding"]))
    if kind == "jsonl":
        lines = [json.dumps(_record(file["field"], text), ensure_ascii=file["escaped"]) for text in file["texts"]]
        ends = file["line_end"].join([*lines, ""] if file["last_end"] else lines)
        if file["bad"]:
            encoded = [line.encode() for line in lines]
            for at, bad in file["bad"]:
                encoded.insert(at, bad.encode("latin-1"))
            return b"\n".join(encoded)
        return bytes(mark + (file["line_end"] * file["blank"] + ends).encode(file["encoding"]))
    rows = io.StringIO(newline="")
    # A line end within a field that is not quoted would be one of the file.
    writer = csv.writer(
        rows, delimiter="," if kind == "csv" else "\t", lineterminator=file["line_end"], quoting=csv.QUOTE_ALL
    )
    writer.writerow(["id", file["field"]])
    writer.writerows(enumerate(file["texts"]))
    return bytes(mark + rows.getvalue().encode(file["encoding"]))


def _record(field: str, text: str) -> dict[str, Any]:
    first, _, rest = field.partition(".")
    return {"id": 1, first: {rest: text, "other": 2} if rest else text}


def _cleaned(text: str) -> str:
    """Returns what docs/domains.md says of a text: line ends are one, and no blank lines stand at either end."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    while len(lines) > 1 and not lines[0].strip():
        del lines[0]
    return "\n".join(lines).rstrip()


def _with_file(trial: Trial, number: int, file: dict[str, Any]) -> Trial:
    return {**trial, "files": [*trial["files"][:number], file, *trial["files"][number + 1 :]]}
