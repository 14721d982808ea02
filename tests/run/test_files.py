"""Files that one process writes while others read."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

from moe_testbed.launcher.run.files import (
    read_json,
    read_json_lines,
    read_yaml,
    write_atomically,
    write_bytes_atomically,
)
from moe_testbed.launcher.run.records import MetricsLine
from moe_testbed.launcher.run.suite_folder import SuiteFolder


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")
    write_atomically(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_bytes_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fill_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError("full")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new one")
    assert path.read_text() == "old"


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"[1]", b"\xff"])
def test_an_object_that_cannot_be_had_is_empty(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == {}


def test_what_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    deep = '{"a": ' * 5_000 + "1" + "}" * 5_000
    for name in ("a.json", "a.yaml", "a.jsonl"):
        (tmp_path / name).write_text(f"{deep}\n" + '{"b": 2}\n' * (name == "a.jsonl"))
    assert read_json(tmp_path / "a.json") == read_yaml(tmp_path / "a.yaml") == {}
    assert read_json_lines(tmp_path / "a.jsonl") == [{"b": 2}]
    assert MetricsLine.of_text(deep.encode()) is None
    (tmp_path / "suite.yaml").write_text(deep)
    with pytest.raises(ValueError, match=r"is not a suite's folder: suite\.yaml cannot be read"):
        SuiteFolder(tmp_path).load_config_tree()


ENDLESS = {
    "in itself": "a: &a [*a]",
    "at a million places": "a0: &a0 [x]\n"
    + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8)),
    "a tag that it does not fit": "a: !!bool x",
    "a date that there is not": "a: 2024-99-99",
}  # fmt: skip


@pytest.mark.parametrize("text", ENDLESS.values(), ids=ENDLESS)
def test_yaml_that_nobody_could_go_through_is_damaged(text: str, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(text)
    assert read_yaml(tmp_path / "suite.yaml") == {}
    with pytest.raises(ValueError, match=r"is not a suite's folder: suite\.yaml cannot be read"):
        SuiteFolder(tmp_path).load_config_tree()


def test_json_that_is_nested_deeper_than_a_report_goes_is_damaged(tmp_path: Path) -> None:
    for levels, read in ((90, True), (110, False)):
        text = '{"a": ' * levels + "1" + "}" * levels
        (tmp_path / "a.json").write_text(text)
        assert read_json(tmp_path / "a.json") == (json.loads(text) if read else {})


def test_lines_that_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": "é"}\n[3]\n{"a": 4', encoding="utf-8")
    assert read_json_lines(path) == [{"a": 1}, {"a": "é"}]


def test_lines_that_begin_in_the_last_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    assert [line["a"] for line in read_json_lines(path, 18)] == [2, 3]
    assert [line["a"] for line in read_json_lines(path, 17)] == [3]
    assert [line["a"] for line in read_json_lines(path, 1000)] == [1, 2, 3]


def test_lines_are_read_one_by_one_whatever_stands_in_them(tmp_path: Path) -> None:
    """The oracle reads each line by itself."""
    good = ['{"a": 1}', '{"b": [{"c": 2}]}', ' {"d": NaN}']
    for odd in (
        [], ['{"a": 1}, {"b": 2}', '{"c": [{"d": 1}', '{"e": 2}]}'], ["[1", "2]", "3, 4"], ["", "null", "7", "[{}]"],
        ['{"a": 1'], ['"a"}', "{"], ['{"a": 1},{"b": 2}', '{"a": [{}', "{}]}"],
        ['{"e": "}, {"}'], ["{}, 1", '{"a": [1', "2]}"],
    ):  # fmt: skip
        path = tmp_path / "lines.jsonl"
        path.write_text("\n".join([*good, *odd, *good]))
        expected = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    expected.append(value)
        assert repr(read_json_lines(path)) == repr(expected)
