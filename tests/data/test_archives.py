import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_testbed.data.errors import DataError
from moe_testbed.data.sources.archives import glob_pattern, read_members

FILES = {"pkg/a.py": b"a", "pkg/sub/b.py": b"bb", "pkg/sub/c.txt": b"c", "pkg/gen/d.py": b"d" * 100}


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
    assert dict(read_members(archive, ["**/*.py"], ["**/gen/**"])) == {"pkg/a.py": b"a", "pkg/sub/b.py": b"bb"}
    assert list(dict(read_members(archive, ["**/*"], max_member_bytes=1))) == ["pkg/a.py", "pkg/sub/c.txt"]


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
def test_nothing_matches(make: Callable[[Path], Path], tmp_path: Path):
    with pytest.raises(DataError, match=r"has no member that matches \*\.rs: correct `members`"):
        list(read_members(make(tmp_path), ["*.rs"]))


@pytest.mark.parametrize("make", [zip_archive, tar_archive])
def test_a_truncated_archive_is_one_clear_line(make: Callable[[Path], Path], tmp_path: Path):
    archive = make(tmp_path)
    archive.write_bytes(archive.read_bytes()[:-60])
    with pytest.raises(DataError, match=r"is damaged .*: delete .* and build again"):
        list(read_members(archive, ["**/*"]))
