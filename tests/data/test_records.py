"""Files of records: the same texts in every format, and what is said of those that cannot be read."""

import csv
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import Arrow, Csv, JsonLines, Parquet, Reader, Tsv, Unreadable
from moe_testbed.data.readers.records import delimited, json_lines
from moe_testbed.data.readers.streams import plain
from moe_testbed.data.sources import FilesSource
from moe_testbed.data.sources.base import Limits, read_file
from moe_testbed.data.sources.tally import Tally

TEXTS = [
    "one",
    'two\nlines, and "quotes"',
    "NA",
    "2024-01-01",
    "",
    "a\u2028b",
    "\ttab",
    "日本 🙂",
    "null",
    "1",
    "x" * 3000,
]


def read(reader: Reader, content: bytes) -> list[list[str] | Unreadable]:
    return list(reader.read(plain(io.BytesIO(content))))


def to_jsonl(rows: list[Any], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": n, field: row}) + "\n" for n, row in enumerate(rows)).encode()


def to_parquet(rows: list[Any], field: str = "text") -> bytes:
    sink = io.BytesIO()
    table = pa.table({"id": range(len(rows)), field: rows})
    pyarrow.parquet.write_table(table, sink, row_group_size=3)
    return sink.getvalue()


def to_arrow(rows: list[Any], field: str = "text", new: Callable[..., Any] = pa.ipc.new_file) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"id": range(len(rows)), field: rows})
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue()


def to_arrow_stream(rows: list[Any], field: str = "text") -> bytes:
    return to_arrow(rows, field, pa.ipc.new_stream)


def to_csv(rows: list[Any], field: str = "text", delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([["id", field], *enumerate(rows)])
    return text.getvalue().encode()


def to_tsv(rows: list[Any], field: str = "text") -> bytes:
    return to_csv(rows, field, "\t")


FORMATS = [
    (JsonLines, to_jsonl),
    (JsonLines, to_parquet),
    (JsonLines, to_arrow),
    (Parquet, to_parquet),
    (Arrow, to_arrow),
    (Arrow, to_arrow_stream),
    (Csv, to_csv),
    (Tsv, to_tsv),
]
TABLES = [(Parquet, to_parquet), (Arrow, to_arrow), (Arrow, to_arrow_stream)]


@pytest.mark.parametrize("reader, write", FORMATS)
def test_text_stays_as_it_is_written(reader: type[Reader], write: Callable[..., bytes]):
    assert read(reader(field="text"), write(TEXTS)) == [[text] for text in TEXTS]
    assert read(reader(field="body"), write(TEXTS * 50, "body")) == [[text] for text in TEXTS * 50]


@pytest.mark.parametrize("reader, write", FORMATS)
def test_a_field_that_is_missing_everywhere_names_those_there_are(reader: type[Reader], write: Callable[..., bytes]):
    tally = Tally(max_bad_records=0.5)
    with pytest.raises(DataError, match=r"\bf .*there is no field 'body' \(there are: id, text\)"):
        list(read_file(reader(field="body"), io.BytesIO(write(TEXTS)), "f", tally))
        tally.check()


@pytest.mark.parametrize("reader", [JsonLines, Parquet, Arrow, Csv, Tsv])
def test_an_empty_file_has_no_documents(reader: type[Reader]):
    assert read(reader(), b"") == []


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"text": "a", "text" "b"}', "no JSON: Expecting ':' delimiter (character 22)"),
        (b'{"text": "cut off', "no JSON: Unterminated string starting at (character 10)"),
        (b'{"text": "a"}{"text": "b"}', "no JSON: Extra data (character 14)"),
        (b'{"text": null}', "text is null"),
        (b'{"text": ["a"]}', "text is a list, not text"),
        (b'{"text": {"a": "b"}}', "text is an object, not text"),
        (b'{"text": 1.5}', "text is a number, not text"),
        (b'{"text": true}', "text is true or false, not text"),
        (b'{"id": 1, "body": "a"}', "there is no field 'text' (there are: id, body)"),
        (b'["a"]', "it is a list, not an object with the field 'text'"),
        (b"null", "it is null, not an object with the field 'text'"),
        (b'{"text": "\xff"}', "'utf-8' codec can't decode byte 0xff in position 10: invalid start byte"),
        (b"[" * 200_000, "it is nested too deeply"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_costs_itself(line: bytes, reason: str):
    content = b'\xef\xbb\xbf{"text": "first"}\n\n' + line + b'\r\n{"text": "last"}'
    assert read(JsonLines(), content) == [["first"], Unreadable("line 3", reason), ["last"]]


def test_an_endless_line_is_not_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(json_lines, "MOST_RECORD_BYTES", 40)
    lines = [b'{"text": "a"}', b"x" * 41, b"y" * 500, b'{"text": "' + b"z" * 27 + b'"}', b'{"text": "b"}']
    found = read(JsonLines(), b"\n".join(lines))
    reason = "it has more than 0 MiB"
    assert found == [["a"], Unreadable("line 2", reason), Unreadable("line 3", reason), ["z" * 27], ["b"]]


def test_a_field_of_a_field():
    rows = [
        {"meta": {"text": "a"}},
        {"meta.text": "b", "meta": {"text": "c"}},
        {"meta": {"title": "d"}},
        {"meta": None},
    ]
    found = read(JsonLines(field="meta.text"), "\n".join(map(json.dumps, rows)).encode())
    assert found == [
        ["a"],
        ["b"],
        Unreadable("line 3", "there is no field 'meta.text' (there are: title)"),
        Unreadable("line 4", "it is null, not an object with the field 'text'"),
    ]
    for reader, write in TABLES:
        assert read(reader(field="meta.text"), write([{"text": "a"}, {"text": "b"}], "meta")) == [["a"], ["b"]]
        assert read(reader(field="meta.text"), write(["a", "b"], "meta.text")) == [["a"], ["b"]]


@pytest.mark.parametrize("reader, write", TABLES)
def test_rows_of_a_table_without_text(reader: type[Reader], write: Callable[..., bytes]):
    assert read(reader(), write(["a", None, "b"])) == [["a"], Unreadable("row 2", "text is null"), ["b"]]
    numbers = read(reader(), write([1, 2]))
    assert numbers == [Unreadable(f"row {n}", "text is a number, not text") for n in (1, 2)]
    unmarked = pa.array([b"a", b"\xff", "é".encode()], pa.binary())
    reason = "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"
    for column in (unmarked, unmarked.view(pa.string())):
        assert read(reader(), write(column)) == [["a"], Unreadable("row 2", reason), ["é"]]
    assert read(reader(), write(pa.array(["a", "b", "a"]).dictionary_encode())) == [["a"], ["b"], ["a"]]


@pytest.mark.parametrize(
    "rows, place, reason",
    [
        ('1,"a" b', "line 5", "',' expected after '\"'"),
        ("1", "line 5", "it has 1 fields, the first row has 2"),
        ("1,a,b", "line 5", "it has 3 fields, the first row has 2"),
        ("1,\udcff", "line 5", "text is no UTF-8"),
    ],
)
def test_a_bad_row_is_named_by_its_line(rows: str, place: str, reason: str):
    content = f'\ufeffid,text\n0,"two\n\nlines"\n{rows}\n2,last\n'.encode(errors="surrogateescape")
    assert read(Csv(), content) == [["two\n\nlines"], Unreadable(place, reason), ["last"]]


def test_a_quote_that_is_never_closed():
    assert read(Csv(), b'text\na\n"b\nc\n') == [["a"], Unreadable("line 3", "unexpected end of data")]


def test_quotes_can_be_text():
    assert read(Tsv(quoted=False), b'text\tid\n"a" he said\t1\n"\t2\n') == [['"a" he said'], ['"']]
    assert read(Csv(delimiter=";"), b"id;text\n1;a,b\n") == [["a,b"]]


def test_a_row_without_end_is_not_held(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(delimited, "MOST_RECORD_BYTES", 10)
    with pytest.raises(ValueError, match="a line has more than 0 MiB"):
        read(Csv(), b"text\n" + b"x" * 11)


def test_a_long_field_is_read():
    """The csv module takes 131,072 characters unless it is told otherwise."""
    generator = random.Random(1)
    text = "\n".join(str(generator.random()) for _ in range(20_000))
    assert read(Csv(), to_csv([text])) == [[text]]


@pytest.mark.parametrize("reader, write", TABLES)
def test_a_damaged_table_is_one_clear_line(reader: type[Reader], write: Callable[..., bytes], tmp_path: Path):
    content = write(TEXTS * 20)
    source = FilesSource(glob=f"{tmp_path}/*", reader=reader())
    for damaged in (content[: len(content) // 2], content[:8] + b"?" * 300 + content[308:], b'{"text": "a"}\n' * 99):
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises(DataError, match=r"^[^\n]*/f is (damaged or was cut off|not what the reader)[^\n]+$"):
            list(source.documents(tmp_path, Limits(10**9, 10**9), Tally(0)))


@pytest.mark.parametrize("beginning", [b"\n", b"\r\n", b" \n\n"])
def test_blank_lines_behind_a_byte_order_mark_are_no_records(beginning: bytes) -> None:
    assert read(JsonLines(), b"\xef\xbb\xbf" + beginning + to_jsonl(["one"])) == [["one"]]
    assert read(JsonLines(), b"\xef\xbb\xbf") == []
