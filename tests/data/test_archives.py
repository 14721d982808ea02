import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.sources.archives import Bounds, glob_pattern, read_members

FILES = {"pkg/a.py": b"a", "pkg/sub/b.py": b"bb", "pkg/sub/c.txt": b"c", "pkg/gen/d.py": b"d" * 100}


def contents(archive: Path, *arguments: Any, **options: Any) -> dict[str, bytes]:
    return {path: file.read() for path, file in read_members(archive, *arguments, **options)}


def zip_archive(folder: Path) -> Path:
    path = folder / "x.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in FILES.items():
            archive.writestr(name, content)
    return path


def tar_archive(folder: Path) -> Path:
    path = folder / "x.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in FILES.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "glob, path, matches",
    [
        ("*.py", "a.py", True),
        ("*.py", "x/a.py", False),
        ("**/*.py", "a.py", True),
        ("**/*.py", "x/y/a.py", True),
        ("x/**/*.py", "x/a.py", True),
        ("x/**", "x/y/z", True),
        ("**/_antlr/**", "sympy/_antlr/p.py", True),
        ("a?.[sS]", "ab.S", True),
        ("a?.[sS]", "ab.c", False),
        ("a.b", "axb", False),
    ],
)
def test_globs(glob: str, path: str, matches: bool):
    assert bool(glob_pattern(glob).fullmatch(path)) == matches


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
def test_members_by_glob(make: Callable[[Path], Path], tmp_path: Path):
    archive = make(tmp_path)
    assert contents(archive, ["**/*.py"], ["**/gen/**"]) == {"pkg/a.py": b"a", "pkg/sub/b.py": b"bb"}
    assert list(contents(archive, ["**/*"], max_member_bytes=1)) == ["pkg/a.py", "pkg/sub/c.txt"]


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
def test_nothing_matches(make: Callable[[Path], Path], tmp_path: Path):
    with pytest.raises(DataError, match=r"has no member that matches \*\.rs: correct `members`"):
        contents(make(tmp_path), ["*.rs"])


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
def test_a_truncated_archive_is_one_clear_line(make: Callable[[Path], Path], tmp_path: Path):
    archive = make(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"is damaged .*: delete .* and build again"):
        contents(archive, ["**/*"])


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
@pytest.mark.parametrize(
    "bounds, reason",
    [
        (Bounds(members=3), "more than 3 members"),
        (Bounds(unpacked=50), "more than 50 bytes unpacked"),
        (Bounds(ratio=0, least=99), r"more than 0 bytes unpacked for each byte of its [\d,]+"),
    ],
)
def test_an_archive_beyond_the_bounds_is_refused(
    make: Callable[[Path], Path], bounds: Bounds, reason: str, tmp_path: Path
):
    with pytest.raises(DataError, match=rf"^x\.(whl|tgz) holds {reason}, .*take this package out of the mix$"):
        contents(make(tmp_path), ["**/*"], bounds=bounds)


def test_what_is_unpacked_counts(tmp_path: Path):
    """Members that nobody asked for are counted in a tar, where they are unpacked all the same, and not in a zip."""
    archive = tar_archive(tmp_path)
    with pytest.raises(DataError, match="more than 3,000 bytes unpacked"):
        contents(archive, ["pkg/a.py"], bounds=Bounds(unpacked=3_000))
    assert contents(zip_archive(tmp_path), ["pkg/a.py"], bounds=Bounds(unpacked=1)) == {"pkg/a.py": b"a"}


def test_an_encrypted_member_is_one_clear_line(tmp_path: Path):
    archive = zip_archive(tmp_path)
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1  # the flag that says so, of the first member
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged \(.*encrypted.*\): delete .* and build again"):
        contents(archive, ["**/*"])
