"""The classes of the tokens of Python code, by Python's own tokenizer and parser: labels that cost nothing."""

import ast
import io
import keyword
import tokenize
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from typing import ClassVar

from moe_testbed.data.documents import Document
from moe_testbed.data.probes.base import Example, Kind, LabelledReader, labelled_reader_kinds

Place = tuple[int, int]
"""Line, from 1, and character in it, as tokenize counts them."""

PLAIN = {tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment"}
F_STRING_START, F_STRING_END = (getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))


@labelled_reader_kinds.register("python_tokens")
class PythonTokens(LabelledReader):
    """Labels names, numbers, strings and comments; signs are what they are and carry no label.

    A name is a keyword, a definition (of a function or class), a parameter, a keyword_argument, an attribute, an
    import (any name of such a statement), a call (of a name), or just a name. What stands in an f-string is a part of
    the string. A file that this Python cannot parse is left out.
    """

    kind: str = "python_tokens"
    task_kind: ClassVar[Kind] = "token"

    def examples(self, document: Document) -> Iterator[Example]:
        text = document.text
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
            tokens = list(_whole_strings(tokenize.generate_tokens(io.StringIO(text).readline)))
        except (SyntaxError, tokenize.TokenError):
            return
        lines = text.split("\n")
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line) + 1)
        class_of = dict(_classes(tree, tokens, lines))
        labels, words = [], []
        before = ""
        for token in tokens:
            label = PLAIN.get(token.type)
            if token.type == tokenize.NAME:
                label = "keyword" if keyword.iskeyword(token.string) else class_of.get(token.start, "name")
                label = "definition" if before in ("def", "class") else label
            if label is not None:
                labels.append(label)
                (row, column), (end_row, end_column) = token.start, token.end
                words.append((starts[row - 1] + column, starts[end_row - 1] + end_column))
            before = token.string
        yield Example(text, tuple(labels), tuple(words))


def _whole_strings(tokens: Iterable[tokenize.TokenInfo]) -> Iterator[tokenize.TokenInfo]:
    """Yields tokens, f-strings as one: Python 3.12 and later take them apart."""
    open_strings: list[tokenize.TokenInfo] = []
    for token in tokens:
        if token.type == F_STRING_START:
            open_strings.append(token)
        elif token.type == F_STRING_END:
            start = open_strings.pop()
            if not open_strings:
                yield start._replace(type=tokenize.STRING, end=token.end)
        elif not open_strings:
            yield token


def _classes(tree: ast.AST, tokens: list[tokenize.TokenInfo], lines: list[str]) -> Iterator[tuple[Place, str]]:
    """Yields where a name stands, and its class, where the tree knows more than the tokens."""

    def place(line: int, byte: int) -> Place:
        return line, len(lines[line - 1].encode()[:byte].decode())

    token_starts = [token.start for token in tokens]
    for node in _outside_of_strings(tree):
        if isinstance(node, ast.arg):
            yield place(node.lineno, node.col_offset), "parameter"
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield place(node.lineno, node.col_offset), "keyword_argument"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield place(node.func.lineno, node.func.col_offset), "call"
        elif isinstance(node, ast.Attribute) and node.end_lineno is not None and node.end_col_offset is not None:
            yield place(node.end_lineno, node.end_col_offset - len(node.attr.encode())), "attribute"
        elif isinstance(node, ast.Import | ast.ImportFrom) and node.end_lineno and node.end_col_offset:
            ends = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            for start in token_starts[slice(*(bisect_left(token_starts, end) for end in ends))]:
                yield start, "import"


def _outside_of_strings(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields all nodes of a tree but those in f-strings."""
    left = [tree]
    while left:
        node = left.pop()
        yield node
        left += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.JoinedStr)]
