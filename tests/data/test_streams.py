"""What is compressed is told by the content."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random
import re
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.readers import JsonLines, Parquet, PlainText, Reader, streams
from moe_testbed.data.sources import FilesSource
from moe_testbed.data.sources.base import Limits
from moe_testbed.data.sources.tally import Tally

GENERATOR = random.Random(2)
TEXTS = [" ".join(str(GENERATOR.random()) for _ in range(100)) for _ in range(40)]


def to_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


def to_parquet(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": texts}), sink)
    return sink.getvalue()


def zstandard(content: bytes) -> bytes:
    compressed: bytes = pa.Codec("zstd").compress(content, asbytes=True)
    return compressed


def skippable(content: bytes) -> bytes:
    """As pzstd writes: a frame to be skipped first."""
    return struct.pack("<II", 0x184D2A50, 4) + b"size" + zstandard(content)


def in_two(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """As `cat a.gz b.gz` makes."""
    return lambda content: compress(content[:777]) + compress(content[777:])


COMPRESSIONS = [gzip.compress, bz2.compress, lzma.compress, zstandard]


def files(tmp_path: Path, reader: Reader, content: bytes, name: str = "a.txt") -> tuple[list[str], Tally]:
    (tmp_path / name).write_bytes(content)
    tally = Tally(max_bad_records=0)
    documents = FilesSource(glob=f"{tmp_path}/*", reader=reader).documents(tmp_path, Limits(10**9, 10**9), tally)
    return [document.text for document in documents], tally


@pytest.mark.parametrize("compress", [bytes, *COMPRESSIONS, skippable, *map(in_two, COMPRESSIONS)])
def test_compressed_files_are_read_whatever_their_name(compress: Callable[[bytes], bytes], tmp_path: Path):
    for name in ("a.jsonl", "a.gz"):
        assert files(tmp_path, JsonLines(), compress(to_jsonl(TEXTS)), name)[0][: len(TEXTS)] == TEXTS
    (tmp_path / "a.gz").unlink()
    assert files(tmp_path, Parquet(), compress(to_parquet(TEXTS)), "a.jsonl")[0] == TEXTS
    assert files(tmp_path, PlainText(), compress("\n".join(TEXTS).encode()), "a.jsonl")[0] == ["\n".join(TEXTS)]


@pytest.mark.parametrize("compress", COMPRESSIONS)
@pytest.mark.parametrize("reader", [JsonLines(), PlainText()])
def test_a_download_that_was_cut_off_is_named(compress: Callable[[bytes], bytes], reader: Reader, tmp_path: Path):
    content = compress(to_jsonl(TEXTS))
    with pytest.raises(DataError, match=r"^[^\n]*a\.txt is damaged or was cut off \([^\n]+\): fetch it again$"):
        files(tmp_path, reader, content[: len(content) // 2])


def test_a_copy_on_disk_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(streams, "MOST_COPIED_BYTES", 1000)
    with pytest.raises(DataError, match=r"a\.txt is not what the reader 'parquet' expects: unpacked, it has more than"):
        files(tmp_path, Parquet(), gzip.compress(to_parquet(TEXTS)))


def test_a_file_for_memory_is_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("moe_testbed.data.readers.base.MOST_FILE_BYTES", 1000)
    assert files(tmp_path, PlainText(), b"x" * 1000)[0] == ["x" * 1000]
    with pytest.raises(DataError, match=r"a\.txt is not what the reader 'plain_text' expects: it has more than 0 MiB"):
        files(tmp_path, PlainText(), gzip.compress(b"x" * 1001))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_tells_the_encoding(encoding: str, tmp_path: Path):
    content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in ["é🙂\u2028x", *TEXTS]).encode(
        encoding
    )
    assert files(tmp_path, JsonLines(), content)[0] == ["é🙂\u2028x", *TEXTS]


def test_big_endian_and_compressed(tmp_path: Path):
    assert files(tmp_path, PlainText(), gzip.compress(codecs.BOM_UTF16_BE + "é".encode("utf-16-be")))[0] == ["é"]


def tar(content: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        info = tarfile.TarInfo("a.txt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


@pytest.mark.parametrize(
    "content, name",
    [
        (b"PK\x03\x04 and so on", "a zip archive"),
        (tar(b"text"), "a tar archive"),
        (gzip.compress(tar(b"text")), "a tar"),
    ],
    # Made of the content, an id would tell when the archive was made, and two processes would collect different tests.
    ids=["zip", "tar", "tar_gz"],
)
def test_an_archive_is_no_text(content: bytes, name: str, tmp_path: Path):
    with pytest.raises(
        DataError, match=rf"a\.txt is not what the reader 'plain_text' expects: it is {name}.*unpack it"
    ):
        files(tmp_path, PlainText(), content)


def test_text_that_begins_like_a_compressed_file(tmp_path: Path):
    assert files(tmp_path, PlainText(), b"BZh9 is how bzip2 begins")[0] == ["BZh9 is how bzip2 begins"]


def test_a_file_that_one_may_not_read_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    (path := tmp_path / "a.txt").touch()
    source = FilesSource(glob=f"{tmp_path}/*")
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))} cannot be read \(Permission denied\): correct that"):
        list(source.documents(tmp_path, Limits(1, 1), Tally(0)))
