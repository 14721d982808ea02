"""The record that every source yields, and how a document falls into paragraphs."""

import re
from dataclasses import dataclass

BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True)
class Document:
    """One text of a domain, the unit of splitting.

    text: with "\\n" line ends and no blank lines at either end (see `clean_text`).
    origin: where it came from, for people: "sympy==1.14.0:sympy/abc.py".
    separator: what stands between paragraphs: a blank line ("\\n\\n") or a line end ("\\n").
    """

    text: str
    origin: str
    separator: str = "\n\n"

    def paragraphs(self) -> list[str]:
        """Returns the paragraphs; joined by `separator` they give the text, but for the length of blank runs."""
        return BLANK_LINES.split(self.text) if self.separator == "\n\n" else self.text.split(self.separator)


def clean_text(text: str) -> str:
    """Unifies line ends, drops a byte-order mark and blank lines at both ends; keeps indentation."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\A(?:[^\S\n]*\n)+", "", text).rstrip()


def utf8_fits(text: str, most_bytes: int) -> bool:
    """Returns whether a text has at most so many bytes of UTF-8."""
    return len(text) * 4 <= most_bytes or len(text.encode()) <= most_bytes


def beginning(text: str, most_bytes: int) -> str:
    """Returns as much of a text as fits, up to the end of a line or a word if there is one in the second half of it."""
    piece = text.encode()[:most_bytes].decode(errors="ignore")
    if len(piece) == len(text):
        return text
    for separators in ("\n", " \t"):
        end = max(map(piece.rfind, separators))
        if end > len(piece) // 2:
            return piece[:end]
    return piece
