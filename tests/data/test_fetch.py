"""Pinned archives, with a fake index: a function that writes what the test wants served."""

import hashlib
import io
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.data.build import build_store, store_path
from moe_testbed.data.config import MixConfig
from moe_testbed.data.errors import DataError
from moe_testbed.data.sources import fetch
from moe_testbed.data.sources.fetch import Pin, fetch_archive


def wheel(texts: dict[str, str]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in texts.items():
            archive.writestr(name, text)
    return content.getvalue()


def pin_of(content: bytes) -> Pin:
    return Pin("pypi", "some-text", "1.0", hashlib.sha256(content).hexdigest())


class FakeIndex:
    """Serves its contents one after the other, the last one for ever, and counts."""

    def __init__(self, *contents: bytes) -> None:
        self.contents = contents
        self.requests = 0

    def __call__(self, pin: Pin, folder: Path) -> Path:
        content = self.contents[min(self.requests, len(self.contents) - 1)]
        self.requests += 1
        path = folder / "served.whl"
        path.write_bytes(content)
        return path


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeIndex]:
    def start(*contents: bytes) -> FakeIndex:
        index = FakeIndex(*contents)
        monkeypatch.setitem(fetch.FETCHERS, "pypi", index)
        return index

    return start


@pytest.fixture
def pip_says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def say(errors: str) -> None:
        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(command, 1, stdout="", stderr=errors)

        monkeypatch.setattr(fetch.subprocess, "run", run)

    return say


def test_a_fetched_archive_is_kept(serve: Callable[..., FakeIndex], tmp_path: Path):
    content = wheel({"a.txt": "x"})
    index = serve(content)
    first = fetch_archive(pin_of(content), tmp_path, lambda _: None)
    second = fetch_archive(pin_of(content), tmp_path, lambda _: None)
    assert first == second and first.read_bytes() == content
    assert index.requests == 1


@pytest.mark.parametrize("damage", [lambda content: content[:20], lambda content: content + b"x", lambda content: b""])
def test_a_damaged_copy_is_fetched_again_once(
    damage: Callable[[bytes], bytes], serve: Callable[..., FakeIndex], tmp_path: Path
):
    content = wheel({"a.txt": "x"})
    index = serve(content)
    path = fetch_archive(pin_of(content), tmp_path, lambda _: None)
    path.write_bytes(damage(content))
    messages: list[str] = []
    assert fetch_archive(pin_of(content), tmp_path, messages.append).read_bytes() == content
    assert index.requests == 2
    assert "does not have the pinned hash: fetching it again" in messages[0]


def test_a_wrong_hash_names_both_and_leaves_nothing_behind(serve: Callable[..., FakeIndex], tmp_path: Path):
    right, wrong = wheel({"a.txt": "right"}), wheel({"a.txt": "wrong"})
    index = serve(wrong)
    with pytest.raises(DataError) as caught:
        fetch_archive(pin_of(right), tmp_path, lambda _: None)
    expected, found = hashlib.sha256(right).hexdigest(), hashlib.sha256(wrong).hexdigest()
    assert f"some-text==1.0 has another hash than pinned: expected sha256 {expected}, found {found}" in str(
        caught.value
    )
    assert index.requests == 1
    assert list(tmp_path.glob("*.whl")) == []


def test_pip_reports_a_wrong_hash(pip_says: Callable[[str], None], tmp_path: Path):
    pip_says(
        "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n"
        f"    Expected sha256 {'0' * 64}\n         Got        {'1' * 64}\n"
    )
    with pytest.raises(DataError, match=f"expected sha256 {'0' * 64}, found {'1' * 64}"):
        fetch_archive(Pin("pypi", "p", "1", "0" * 64), tmp_path, lambda _: None)


@pytest.mark.parametrize(
    "errors, message",
    [
        (
            "WARNING: x\nERROR: No matching distribution found for p==1\n",
            r"\(No matching distribution found for p==1\)",
        ),
        ("/usr/bin/python: No module named pip\n", "this Python has no pip; run `.* -m ensurepip`"),
    ],
)
def test_a_missing_package_or_client(errors: str, message: str, pip_says: Callable[[str], None], tmp_path: Path):
    pip_says(errors)
    with pytest.raises(DataError, match=message):
        fetch_archive(Pin("pypi", "p", "1", "0" * 64), tmp_path, lambda _: None)


def test_npm_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(fetch.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match="p@1 cannot be fetched: npm is not installed"):
        fetch_archive(Pin("npm", "p", "1", "0" * 64), tmp_path, lambda _: None)


def mix_with_missing(make_mix: Callable[..., MixConfig], strict: bool, optional: bool) -> MixConfig:
    good = make_mix().model_dump(mode="json")
    gone = {"kind": "package", "package": "gone", "version": "1", "sha256": "0" * 64, "members": ["*"]}
    lost = {"sources": [gone], "optional": optional}
    return MixConfig.model_validate(good | {"strict": strict, "domains": good["domains"] | {"lost": lost}})


def test_a_missing_package_costs_an_optional_domain_not_the_mix(
    make_mix: Callable[..., MixConfig], pip_says: Callable[[str], None], tmp_path: Path
):
    pip_says("ERROR: No matching distribution found for gone==1\n")
    messages: list[str] = []
    mix = mix_with_missing(make_mix, strict=False, optional=True)
    store = build_store(mix, tmp_path, messages.append)
    assert store.domains == ("latin", "greek", "digits")
    assert "gone==1 cannot be fetched" in store.manifest["dropped"]["lost"]
    assert any(
        message.startswith("domain 'lost' is left out of the mix 'fixture', in which it is optional: gone==1")
        for message in messages
    )
    # The store without it is not that of the mix that needs it.
    for needs_it in ({"strict": True, "optional": True}, {"strict": False, "optional": False}):
        assert store_path(mix_with_missing(make_mix, **needs_it), tmp_path) != store.path


@pytest.mark.parametrize("strict, optional", [(False, False), (True, True)])
def test_a_missing_package_stops_the_build_if_its_domain_is_needed(
    strict: bool,
    optional: bool,
    make_mix: Callable[..., MixConfig],
    pip_says: Callable[[str], None],
    tmp_path: Path,
):
    pip_says("ERROR: No matching distribution found for gone==1\n")
    with pytest.raises(DataError, match=r"domain 'lost' of the mix 'fixture': gone==1 cannot .*optional: true"):
        build_store(mix_with_missing(make_mix, strict, optional), tmp_path, lambda _: None)
    assert not (tmp_path / "stores").exists() or not list((tmp_path / "stores").glob("fixture*"))


def test_a_package_becomes_a_domain(corpus: dict[str, Path], serve: Callable[..., FakeIndex], tmp_path: Path):
    content = wheel({f"text/{path.name}": path.read_text(encoding="utf-8") for path in corpus["latin"].iterdir()})
    serve(content)
    source = {"kind": "package", "package": "some-text", "version": "1.0", "members": ["text/*.txt"]}
    source["sha256"] = hashlib.sha256(content).hexdigest()
    settings = {"name": "m", "vocab_size": 512, "validation_fraction": 0.1, "tuning_fraction": 0.1}
    mix = MixConfig.model_validate(settings | {"domains": {"latin": {"licence": "MIT", "sources": [source]}}})
    recorded = build_store(mix, tmp_path, lambda _: None).manifest["domains"]["latin"]
    assert recorded["sources"][0]["sha256"] == source["sha256"]
    assert recorded["licence"] == "MIT"
    assert recorded["deduplication"]["documents_read"] == 60
