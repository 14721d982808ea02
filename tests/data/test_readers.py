"""Every reader on a tiny input made here."""

import io
import json
import re
import sqlite3
from pathlib import Path

import pytest

from moe_testbed.data.documents import Document, clean_text
from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import (
    AbcTunes,
    AnnotatedText,
    Fasta,
    HtmlText,
    JsonField,
    JsonKey,
    JsonLeaves,
    JsonList,
    LawTree,
    LicenseText,
    LineGroups,
    PlainText,
    Reader,
    SourceCode,
    SqliteRows,
    Unreadable,
)
from moe_testbed.data.sources.base import read_file
from moe_testbed.data.sources.tally import Tally


def read(reader: Reader, content: bytes, origin: str, tally: Tally) -> list[Document]:
    return list(read_file(reader, io.BytesIO(content), origin, tally))


def texts(reader: Reader, content: bytes) -> list[str]:
    """The documents of a file of which every record can be read."""
    tally = Tally(max_bad_records=0)
    found = [document.text for document in read(reader, content, "file", tally)]
    assert tally.named == []
    return found


def test_plain_text_falls_back():
    assert list(PlainText().texts("héllo".encode())) == ["héllo"]
    assert list(PlainText(fallback_encoding="latin-1").texts("héllo".encode("latin-1"))) == ["héllo"]
    with pytest.raises(UnicodeDecodeError):
        list(PlainText().texts("héllo".encode("latin-1")))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("/* Copyright X\n */\nint x;", "\nint x;"),
        ("\n// SPDX-License-Identifier: MIT\n// more\nint x;", "int x;"),
        ("# Licensed under Y\n.text\n", ".text\n"),
        ("// What this file does.\nint x;", "// What this file does.\nint x;"),
        ("#include <a>\n// Copyright", "#include <a>\n// Copyright"),
        ("int x; /* Copyright */", "int x; /* Copyright */"),
    ],
)
def test_source_code_loses_its_licence_and_nothing_else(source: str, expected: str):
    assert list(SourceCode().texts(source.encode())) == [expected]


def test_abc_tunes_are_documents():
    book = "% a book\r\nX:1\r\nT:Ä\r\nK:D\r\nABc|\r\n\r\nX:2\r\nK:G\r\n"
    expected = ["X:1\nT:Ä\nK:D\nABc|\n\n", "X:2\nK:G\n"]
    assert list(AbcTunes().texts(book.encode())) == expected
    assert list(AbcTunes().texts(book.encode("latin-1"))) == expected


def test_annotated_text_is_corrected():
    text = "Так{=>,:::error_type=Punctuation} {був=>було:::error_type=G/Case}{ зайве=>:::error_type=Fluency}. {інше}"
    assert list(AnnotatedText().texts(text.encode())) == ["Так, було. {інше}"]


def test_fasta_in_groups_without_headers():
    records = ">one\nMK\nLV\n>two\nAA\n>three > x\nGG\n"
    assert list(Fasta(records_per_document=2).texts(records.encode())) == ["MK\nLV\n\nAA", "GG"]
    with pytest.raises(ValueError, match="begins with '>'"):
        list(Fasta().texts(b"MKLV"))


def test_json_leaves_by_depth():
    book = {"Genesis": [["a", "b"], ["c"]], "Exodus": [["d", " "]]}
    content = json.dumps(book).encode()
    assert list(JsonLeaves().texts(content)) == ["a\n\nb\n\nc\n\nd"]
    assert list(JsonLeaves(document_depth=1).texts(content)) == ["a\n\nb\n\nc", "d"]
    assert list(JsonLeaves(document_depth=2).texts(content)) == ["a\n\nb", "c", "d"]


def test_json_list():
    content = json.dumps({"sentences": [{"text": "a"}, {"text": "b\nb"}, {"text": "c"}]}).encode()
    reader = JsonList(records="sentences", records_per_document=2)
    assert texts(reader, content) == ["a\nb b", "c"]


def test_a_bad_record_of_a_list_costs_itself():
    content = json.dumps({"rows": [{"text": "a"}, {"text": None}, "x", {"text": "b"}, {"body": "c"}]}).encode()
    assert list(JsonList(records="rows", records_per_document=2).read(io.BytesIO(content))) == [
        [],
        Unreadable("record 2", "text is null"),
        Unreadable("record 3", "it is text, not an object with the field 'text'"),
        ["a\nb"],
        Unreadable("record 5", "there is no field 'text' (there are: body)"),
    ]


def test_law_tree_recurses():
    article = {"type": "article", "data": {"texte": "Art. 1"}}
    repealed = {"type": "article", "data": {"texte": None}}
    section = {"type": "section", "data": {"title": "T"}, "children": [article, repealed]}
    tree = {"type": "code", "data": {}, "children": [section, {"type": "article", "data": {"texte": "Art. 2"}}]}
    assert list(LawTree().texts(json.dumps(tree).encode())) == ["Art. 1", "Art. 2"]


def test_license_text_skips_front_matter_other_languages_and_stubs():
    reader = LicenseText(minimum_characters=5)
    assert list(reader.texts(b"---\nkey: a\n---\n\nYou may --- use it.\n")) == ["You may --- use it.\n"]
    assert list(reader.texts(b"---\nkey: a\nlanguage: fr\n---\nVous pouvez")) == []
    assert list(reader.texts(b"---\nkey: a\n---\nMIT")) == []


def test_line_groups():
    assert texts(LineGroups(lines_per_document=2), b"\xef\xbb\xbfa\r\nb\nc") == ["a\nb", "c"]
    assert texts(LineGroups(lines_per_document=3), b"a\nb\n") == ["a\nb\n"]
    assert list(LineGroups(lines_per_document=2).read(io.BytesIO(b"a\n\xff\nb"))) == [
        [],
        Unreadable("line 2", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ["a\nb"],
    ]


def test_sqlite_rows_by_group_in_stored_order(tmp_path: Path):
    path = tmp_path / "laws.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE articles (law TEXT, number TEXT, body TEXT)")
        rows = [("b", "I", "x"), ("a", "I", "y"), ("b", "II", "z"), ("b", "III", None)]
        connection.executemany("INSERT INTO articles VALUES (?, ?, ?)", rows)
    connection.close()
    reader = SqliteRows(table="articles", group_by="law", prefix="number", text="body")
    assert texts(reader, path.read_bytes()) == ["I y", "I x\n\nII z"]
    with pytest.raises(ValueError, match="no such column: nothing"):
        texts(SqliteRows(table="articles", group_by="law", text="nothing"), path.read_bytes())
    with pytest.raises(ValueError, match="plain table or column name"):
        SqliteRows(table="articles; DROP TABLE articles", group_by="law", text="body")


def test_a_file_that_is_a_record_and_cannot_be_read_is_passed_over_and_named():
    tally = Tally(max_bad_records=0.5)
    assert read(LawTree(), b"{}", "a.json", tally) == read(LawTree(), b" \n", "empty.json", tally) == []
    assert (tally.records, tally.unreadable, tally.named) == (1, 1, ["a.json: key 'type' is missing"])


def test_a_file_that_holds_no_records_is_one_clear_line():
    with pytest.raises(
        DataError, match=r"b\.db is not what the reader 'sqlite_rows' expects: .*not a database; choose another"
    ):
        read(SqliteRows(table="t", group_by="g", text="x"), b"no database at all" * 99, "b.db", Tally(0))


def test_clean_text_and_paragraphs():
    assert clean_text("\ufeff\r\n  \r\n  a\r\n\tb  \n\n") == "  a\n\tb"
    assert Document("a\n \n\n  b\nc", "x").paragraphs() == ["a", "  b\nc"]
    assert Document("a\nb", "x", separator="\n").paragraphs() == ["a", "b"]


PROMPTS = json.dumps({"logic": "A heading.\n\nQ: one?\nA: 1.\n\nQ: two?\n\nA: 2.\n\nQ: \n", "empty": "", "list": []})


def test_the_text_under_a_key_is_cut_into_documents():
    assert list(JsonKey(key="logic", separator="\n\nQ: ", skip=1).texts(PROMPTS.encode())) == [
        "one?\nA: 1.",
        "two?\n\nA: 2.",
    ]
    assert list(JsonKey(key="logic", separator="###").texts(PROMPTS.encode())) == [json.loads(PROMPTS)["logic"]]
    assert list(JsonKey(key="empty").texts(PROMPTS.encode())) == []


@pytest.mark.parametrize("key, reason", [("ethics", "key 'ethics' is missing"), ("list", "stands no text but list")])
def test_a_key_without_text_is_named(key: str, reason: str):
    tally = Tally(max_bad_records=0)
    assert read(JsonKey(key=key), PROMPTS.encode(), "prompts.json", tally) == []
    assert re.fullmatch(f"prompts.json: .*{reason}", tally.named[0])


CHAPTERS = json.dumps(
    [
        {
            "name": "א",
            "translation": "First",
            "verses": [{"text": "אב", "translation": "in\nthe"}, {"translation": " "}],
        },
        {"name": "ב", "verses": [{"text": "גד", "translation": "beginning"}]},
    ]
)


def test_one_field_of_nested_records_is_the_text():
    assert list(JsonField(field="translation", document_depth=1).texts(CHAPTERS.encode())) == [
        "First\nin the",
        "beginning",
    ]
    assert list(JsonField(field="translation").texts(CHAPTERS.encode())) == ["First\nin the\nbeginning"]
    with pytest.raises(ValueError, match="no record has a text under 'verse'"):
        list(JsonField(field="verse").texts(CHAPTERS.encode()))


PAGE = """<!doctype html><html><head><title>Not shown</title><style>p {color: red}</style></head><body>
  <h1>Rights &amp; duties</h1>
  <header><h2>Preamble</h2><p>Whereas <b>all</b>
    are free&#8212;</p></header>
  <article><h2>1</h2><p>One.<br>More</p><article><p>inside</p></article><script>var p = "<p>no</p>"</script></article>
  <p>between</p><article><ul><li>a</li><li>b</li></ul></article><article> </article></body></html>"""


def test_elements_of_a_page_are_documents():
    reader = HtmlText(document_tags=("header", "article"))
    assert list(reader.texts(PAGE.encode())) == [
        "Preamble\n\nWhereas all are free—",
        "1\n\nOne. More\n\ninside",
        "a\n\nb",
    ]


def test_a_page_is_one_document_without_tags():
    (text,) = HtmlText().texts(PAGE.encode())
    assert text.split("\n\n")[:6] == [
        "Rights & duties",
        "Preamble",
        "Whereas all are free—",
        "1",
        "One. More",
        "inside",
    ]
    assert "Not shown" not in text and "color" not in text and "var" not in text


def test_a_page_without_such_elements_is_named():
    tally = Tally(max_bad_records=0)
    assert read(HtmlText(document_tags=("section",)), PAGE.encode(), "page.html", tally) == []
    assert tally.named == ["page.html: the page has no text in <section>"]
