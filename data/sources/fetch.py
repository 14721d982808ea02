"""Pinned archives from the user's own package index, checked by SHA-256 every time before use."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from moe_testbed.data.errors import DataError


@dataclass(frozen=True)
class Pin:
    """Names one archive: index "pypi" or "npm", package, version and the SHA-256 (hexadecimal) of the archive."""

    index: str
    package: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.package}=={self.version}" if self.index == "pypi" else f"{self.package}@{self.version}"


def fetch_archive(pin: Pin, folder: Path, log: Callable[[str], None]) -> Path:
    """Returns the path of the checked archive in `folder`, downloading it only if it is not there yet.

    A damaged copy is fetched again, once. Raises DataError if the package or its client is missing or the hash differs.
    """
    path = folder / f"{pin.package.replace('/', '-').lstrip('@')}-{pin.version}{SUFFIXES[pin.index]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Two domains may read the same archive, and two builds may run at once: one fetches, the other finds it there.
    with FileLock(folder / f".{path.name}.lock"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if path.exists():
            if file_sha256(path) == pin.sha256:
                return path
            log(f"{path.name} in the cache does not have the pinned hash: fetching it again")
        downloaded = FETCHERS[pin.index](pin, Path(temporary))
        found = file_sha256(downloaded)
        if found != pin.sha256:
            raise _wrong_hash(pin, found)
        log(f"fetched {pin} ({downloaded.stat().st_size / 1e6:.1f} MB)")
        os.replace(downloaded, path)
    return path


def fetch_from_pypi(pin: Pin, folder: Path) -> Path:
    """Downloads the wheel with pip, which checks the hash itself; a source archive would run code, so wheels only."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pin} --hash=sha256:{pin.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", "--require-hashes", "-r", str(requirements)]
    result = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    if result.returncode != 0:
        if "No module named pip" in result.stderr:
            raise DataError(f"{pin} cannot be fetched: this Python has no pip; run `{sys.executable} -m ensurepip`")
        found = re.search(r"Got\s+([0-9a-f]{64})", result.stderr)
        raise _wrong_hash(pin, found.group(1)) if found else _not_found(pin, "pip", result.stderr)
    return _only_file(pin, folder, ".whl")


def fetch_from_npm(pin: Pin, folder: Path) -> Path:
    """Downloads the tarball with npm; its scripts are not run."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(
            f"{pin} cannot be fetched: npm is not installed; install it, or take this domain out of the mix"
        )
    command = [npm, "pack", str(pin), "--ignore-scripts", "--pack-destination", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise _not_found(pin, "npm", result.stderr)
    return _only_file(pin, folder, ".tgz")


FETCHERS: dict[str, Callable[[Pin, Path], Path]] = {"pypi": fetch_from_pypi, "npm": fetch_from_npm}
SUFFIXES: Mapping[str, str] = {"pypi": ".whl", "npm": ".tgz"}


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _only_file(pin: Pin, folder: Path, suffix: str) -> Path:
    files = list(folder.glob(f"*{suffix}"))
    if len(files) != 1:
        raise DataError(f"{pin}: the index offers no {suffix} archive; pin a version that has one")
    return files[0]


def _wrong_hash(pin: Pin, found: str) -> DataError:
    return DataError(
        f"{pin} has another hash than pinned: expected sha256 {pin.sha256}, found {found}; "
        "if you trust what your index serves, correct `sha256` in the mix file, else take this domain out"
    )


def _not_found(pin: Pin, client: str, errors: str) -> DataError:
    """Takes the reason from what pip ("ERROR: ...") or npm ("npm error ...") said last or first of all."""
    lines = re.findall(r"^(?:ERROR: |npm (?:ERR!|error) (?!code|A complete log))(.+)$", errors, re.MULTILINE)
    reason = (lines[-1] if client == "pip" else lines[0]) if lines else errors.strip()[-200:] or "no reason given"
    return DataError(
        f"{pin} cannot be fetched from your {client} index ({reason.strip()}): "
        "check the network and the version, or take this domain out of the mix"
    )
