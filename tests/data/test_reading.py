"""What a mix keeps of its domains, and what it says of the rest."""

import json
import os
import random
import re
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from moe_testbed.data.build import build_store
from moe_testbed.data.config import MixConfig
from moe_testbed.data.deduplication import normalise
from moe_testbed.data.documents import Document
from moe_testbed.data.errors import DataError
from moe_testbed.data.inspect import describe_documents, describe_store
from moe_testbed.data.manifest import describe_texts
from moe_testbed.data.reading import domain as reading_domain
from moe_testbed.data.sources import FilesSource
from moe_testbed.data.texts import ALL, labelled_documents, read_texts

Write = Callable[..., MixConfig]
WORDS = ["".join(random.Random(n).choices("abcdefghij", k=6)) for n in range(300)]


def paragraph(seed: object, words: int = 12) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=words))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes domain -> lines of a JSON Lines file, a string being the text of a record; returns a mix of them."""

    def make(domains: dict[str, list[Any]], optional: tuple[str, ...] = (), **settings: Any) -> MixConfig:
        for name, lines in domains.items():
            content = [line if isinstance(line, bytes) else json.dumps({"text": line}).encode() for line in lines]
            (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(content))
        described = {
            name: {
                "sources": [{"kind": "files", "glob": f"{tmp_path}/{name}.jsonl", "reader": "jsonl"}],
                "optional": name in optional,
            }
            for name in domains
        }
        sizes = {"validation_fraction": 0.1, "tuning_fraction": 0.1, "minimum_document_characters": 10}
        return MixConfig.model_validate({"name": "m", "vocab_size": 512, "domains": described, **sizes, **settings})

    return make


def read(mix: MixConfig, tmp_path: Path) -> tuple[dict[str, list[str]], dict[str, Any], list[str]]:
    """Domain -> its texts, what the manifest says of it, and what was said while reading."""
    said: list[str] = []
    texts = read_texts(mix, tmp_path / "cache", said.append)
    found = {name: [d.text for d in documents] for name, documents in labelled_documents(texts, ALL).items()}
    return found, describe_texts(texts)["domains"], said


def corpora(seed: int) -> dict[str, list[str]]:
    """Documents that share paragraphs, within a domain and beyond, and of which some recur in other letters."""
    generator = random.Random(seed)

    def document() -> str:
        return "\n\n".join(paragraph(generator.randrange(900)) for _ in range(generator.randint(1, 6)))

    domains = {name: [document() for _ in range(120)] for name in ("one", "two", "three")}
    domains["two"] += [text.upper() for text in domains["one"][::5]]
    return domains


def in_memory(domains: dict[str, list[str]], max_bytes: int) -> dict[str, list[str]]:
    """The oracle: reads everything, removes what occurred before, sorts by digest and keeps a beginning of that."""
    documents, paragraphs, kept = set[str](), set[str](), {}
    for name, texts in domains.items():
        unique = []
        for text in texts:
            if normalise(text) in documents:
                continue
            documents.add(normalise(text))
            new = [part for part in text.split("\n\n") if normalise(part) not in paragraphs]
            new = [part for n, part in enumerate(new) if normalise(part) not in map(normalise, new[:n])]
            paragraphs.update(map(normalise, new))
            if len("\n\n".join(new)) >= 10:
                unique.append("\n\n".join(new))
        unique.sort(key=lambda text: blake2b(text.encode(), digest_size=16).digest())
        size, kept[name] = 0, list[str]()
        for text in unique:
            size += len(text.encode())
            if size > max_bytes:
                break
            kept[name].append(text)
    return kept


@pytest.mark.parametrize("max_bytes", [9_000, 15_000, 10**6])
def test_reading_as_a_stream_keeps_what_reading_everything_keeps(max_bytes: int, write: Write, tmp_path: Path):
    domains = corpora(seed=1)
    mix = write(domains, max_bytes_per_domain=max_bytes, max_document_share=1)
    found, _, _ = read(mix, tmp_path)
    expected = in_memory(domains, max_bytes)
    assert {name: sorted(texts) for name, texts in found.items()} == {n: sorted(texts) for n, texts in expected.items()}


def test_nothing_that_is_kept_recurs_when_what_is_not_kept_is_forgotten(
    monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path
):
    monkeypatch.setattr(reading_domain, "KEPT_BYTES_PER_DIGEST", 500)
    domains = corpora(seed=2)
    found, _, _ = read(write(domains, max_bytes_per_domain=6_000, max_document_share=1), tmp_path)
    paragraphs = [normalise(part) for texts in found.values() for text in texts for part in text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs)) > 100
    assert all(5_000 < sum(map(len, texts)) <= 6_000 for texts in found.values())


def test_memory_and_cache_do_not_grow_with_what_is_read(write: Write, tmp_path: Path):
    long = "x" * 21_000

    def peak(lines: int) -> int:
        mix = write({"a": [f"{n} {long}" for n in range(lines)]}, max_bytes_per_domain=200_000, max_document_share=1)
        tracemalloc.start()
        read(mix, tmp_path)
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(15)  # imports
    few, many = peak(15), peak(300)
    assert (tmp_path / "a.jsonl").stat().st_size > 6_000_000
    assert many < few + 200_000
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 700_000


LONG = "\n\n".join(paragraph(f"long {n}") for n in range(200))


def test_a_long_document_is_cut_and_hides_no_other(write: Write, tmp_path: Path):
    short = [paragraph(f"short {n}") for n in range(100)]
    mix = write({"a": [LONG, *short]}, max_bytes_per_domain=15_000)
    found, described, said = read(mix, tmp_path)
    (kept,) = (text for text in found["a"] if LONG.startswith(text))
    assert 1_400 < len(kept) <= 1_500 and LONG[len(kept) :].startswith("\n\n")
    assert set(found["a"]) == {kept, *short}
    left_out = len(LONG) - len(kept) - 2
    assert described["a"]["left_out"] == {"cut_documents": 1, "cut_bytes": left_out}
    told = re.compile(r"a: only the beginning .*1,500 bytes \(documents: 1, left out of them: 0\.0 MB\)")
    assert any(map(told.fullmatch, said))
    store = build_store(mix, tmp_path / "cache", lambda _: None)
    tokens = store.manifest["domains"]["a"]["left_out"]["cut_tokens"]
    size = sum(split["bytes"] for split in store.manifest["domains"]["a"]["splits"].values())
    assert tokens == pytest.approx(left_out * len(store.tokens) / size, abs=1)
    shown, counts = describe_store(store), f"documents: 1, {left_out:,} bytes, about {tokens:,} tokens"
    assert f"left out of a: the ends of long documents ({counts})" in shown
    assert f" {tokens:,}  unknown" in shown  # the column


def test_tokens_beyond_the_cap_are_told(write: Write, tmp_path: Path):
    mix = write({"a": [paragraph(n) for n in range(100)]}, max_bytes_per_domain=4_000, max_document_share=1)
    store = build_store(mix, tmp_path / "cache", lambda _: None)
    figures = store.manifest["domains"]["a"]
    kept = sum(split["bytes"] for split in figures["splits"].values())
    beyond = (figures["deduplication"]["bytes_kept"] - kept) * len(store.tokens) / kept
    (row,) = (line for line in describe_store(store).splitlines() if line.startswith("a "))
    assert int(row.split()[-2].replace(",", "")) == pytest.approx(beyond, abs=1)
    assert "left_out" not in figures


def test_an_evaluation_set_is_not_cut(write: Write, tmp_path: Path):
    found, described, _ = read(write({"a": [LONG]}, evaluation_only=True, max_bytes_per_domain=1_000), tmp_path)
    assert found == {"a": [LONG]} and "left_out" not in described["a"]


def with_bad(count: int, of: int) -> list[Any]:
    return [b'{"text": null}' if n % (of // count) == 3 else paragraph(n) for n in range(of)]


def test_bad_records_are_passed_over_named_and_counted(write: Write, tmp_path: Path):
    lines = with_bad(2, 200)
    mix = write({"a": lines}, max_document_share=1)
    found, described, said = read(mix, tmp_path)
    assert sorted(found["a"]) == sorted(line for line in lines if isinstance(line, str))
    first = [f"{tmp_path}/a.jsonl line {n}: text is null" for n in (4, 104)]
    assert described["a"]["left_out"] == {"records": 200, "unreadable_records": 2, "first_unreadable": first}
    assert f"a: 2 of 200 records cannot be read and are left out: {'; '.join(first)}" in said
    store = build_store(mix, tmp_path / "cache", lambda _: None)
    assert f"left out of a: 2 of 200 records, which cannot be read, first {first[0]}" in describe_store(store)
    evaluated = read_texts(mix.model_copy(update={"evaluation_only": True}), tmp_path / "cache", lambda _: None)
    assert f"left out of a: 2 of 200 records, which cannot be read, first {first[0]}" in describe_documents(evaluated)


@pytest.mark.parametrize("allowed, fails", [(0.0, True), (0.0299, True), (0.03, False), (0.5, False)])
def test_a_share_of_bad_records_is_allowed(allowed: float, fails: bool, write: Write, tmp_path: Path):
    domains = {"a": with_bad(6, 200), "b": [paragraph(f"b{n}") for n in range(50)]}
    # What was read under another limit is not read again, and judged anew.
    read(write(domains, max_bad_records=0.9), tmp_path)
    mix = write(domains, max_bad_records=allowed)
    if not fails:
        assert set(read(mix, tmp_path)[0]) == {"a", "b"}
        return
    message = (
        rf"^domain 'a' of the mix 'm': 6 of 200 records cannot be read, and max_bad_records = {allowed:g} allows .*"
        rf"a\.jsonl line 4: text is null; .*; \.\.\.: correct .* raise max_bad_records .*`optional: true`\)$"
    )
    with pytest.raises(DataError, match=message):
        read(mix, tmp_path)
    found, _, said = read(write(domains, ("a",), max_bad_records=allowed), tmp_path)
    assert list(found) == ["b"]
    assert any(line.startswith("domain 'a' is left out of the mix 'm'") for line in said)


def test_a_file_of_which_nothing_can_be_read_is_not_read_to_its_end(write: Write, tmp_path: Path):
    with pytest.raises(DataError, match="100 of 100 records cannot be read"):
        read(write({"a": [b"{"] * 10_000}), tmp_path)


def test_a_domain_that_fails_takes_nothing_from_others(write: Write, tmp_path: Path):
    shared = [paragraph(n) for n in range(50)]
    found, _, _ = read(write({"a": [*shared, *[b"{"] * 50], "b": shared}, ("a",)), tmp_path)
    assert sorted(found["b"]) == sorted(shared)


@pytest.mark.parametrize("escape", [r"\ud83d", r"\udc4d", r"\udc4d\ud83d"])
def test_half_a_surrogate_pair_is_replaced(escape: str, write: Write, tmp_path: Path):
    lines = [paragraph(n) for n in range(50)]
    bad = f'{{"text": "{paragraph("bad")} {escape} \\ud83d\\ude42 end"}}'.encode()
    found, described, said = read(write({"a": [*lines, bad]}), tmp_path)
    mended = " ".join([paragraph("bad"), "\ufffd" * (len(escape) // 6), "\U0001f642 end"])
    assert set(found["a"]) == {*lines, mended}
    assert described["a"]["left_out"] == {"mended_documents": 1}
    assert any("half of a surrogate pair" in line and "a.jsonl" in line for line in said)


def test_what_was_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch, write: Write, tmp_path: Path):
    """A build that is killed at its second domain; the other text of the same result comes from an undisturbed one."""
    mix = write(corpora(seed=3), max_bytes_per_domain=9_000)
    expected = read(mix, tmp_path / "undisturbed")
    reads: list[str] = []
    documents = FilesSource.documents

    def killed(self: FilesSource, *arguments: Any) -> Iterator[Document]:
        reads.append(Path(self.glob).stem)
        if reads == ["one", "two"]:
            raise KeyboardInterrupt
        yield from documents(self, *arguments)

    monkeypatch.setattr(FilesSource, "documents", killed)
    with pytest.raises(KeyboardInterrupt):
        read(mix, tmp_path)
    assert read(mix, tmp_path) == expected
    assert reads == ["one", "two", "two", "three"]
    assert read(mix, tmp_path) == expected
    assert len(reads) == 4
    # A domain depends on those before it, and on the settings.
    read(write(corpora(seed=3), max_bytes_per_domain=9_001), tmp_path)
    assert len(reads) == 7


def test_a_damaged_cache_is_read_anew(write: Write, tmp_path: Path):
    mix = write(corpora(seed=4))
    expected = read(mix, tmp_path)
    for damage in (b"", b"PK\x03\x04", b"no archive"):
        for path in (tmp_path / "cache" / "documents").iterdir():
            path.write_bytes(damage)
        assert read(mix, tmp_path) == expected


def test_file_names_of_any_bytes(tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    try:
        for name in (b"caf\xe9.txt", b"two\nlines.txt", "日本.txt".encode()):
            Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(paragraph(name, 80))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for number in range(20):
        (folder / f"{number}.txt").write_text(paragraph(number, 80))
    (folder / "empty.txt").touch()
    source = {"kind": "files", "glob": f"{folder}/*.txt"}
    shares = {"validation_fraction": 0.2, "tuning_fraction": 0.2}
    mix = MixConfig.model_validate({"name": "m", "vocab_size": 512, "domains": {"a": {"sources": [source]}}, **shares})
    store = build_store(mix, tmp_path / "cache", lambda _: None)
    names = {Path(path).name for path, *_ in store.manifest["domains"]["a"]["sources"][0]["files"]}
    assert {"caf\\xe9.txt", "two\\nlines.txt", "日本.txt"} < names
    assert len(store.document_starts) - 1 == 23
    describe_store(store).encode()
