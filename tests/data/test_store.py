"""From files to a store and back."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasets.arrow_writer import ArrowWriter

from moe_testbed.data import build, loading
from moe_testbed.data.build import build_store, store_path
from moe_testbed.data.config import MixConfig
from moe_testbed.data.deduplication import normalise
from moe_testbed.data.errors import DataError
from moe_testbed.data.reading import cache
from moe_testbed.data.splits import SPLITS
from moe_testbed.data.tokens.store import Store
from moe_testbed.data.tokens.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_tokenizer


def decoded(store: Store) -> dict[tuple[str, str], list[str]]:
    """(split, domain) -> texts, cut at the end-of-document piece: not by the boundaries that the store keeps."""
    tokenizer = load_tokenizer(store.tokenizer_path)
    texts: dict[tuple[str, str], list[str]] = {}
    for split in SPLITS:
        for domain in store.domains:
            documents: list[list[int]] = [[]]
            for token in store.tokens_of(split, domain).tolist():
                if token == END_OF_DOCUMENT:
                    documents.append([])
                else:
                    documents[-1].append(token)
            assert documents.pop() == []
            texts[split, domain] = [tokenizer.decode(document) for document in documents]
    return texts


def test_every_document_comes_back_once(store: Store, corpus: dict[str, Path]):
    texts = decoded(store)
    for domain, folder in corpus.items():
        written = sorted(path.read_text(encoding="utf-8") for path in folder.iterdir())
        assert sorted(text for split in SPLITS for text in texts[split, domain]) == written


def test_boundaries_are_where_documents_end(store: Store):
    ends = np.flatnonzero(np.asarray(store.tokens) == END_OF_DOCUMENT) + 1
    assert np.array_equal(store.document_starts, np.concatenate([[0], ends]))
    assert np.array_equal(store.document_of(ends - 1), np.arange(len(ends)))
    assert np.array_equal(store.document_of(ends[:-1]), np.arange(1, len(ends)))


def test_no_paragraph_is_in_two_splits(make_mix: Callable[..., MixConfig], corpus: dict[str, Path], tmp_path: Path):
    shared = tmp_path / "shared"
    shutil.copytree(corpus["latin"], shared)
    paragraph = "the same licence stands at the head of every single file of this project"
    for number, path in enumerate(sorted(shared.iterdir())):
        heading = paragraph.upper() if number % 2 else paragraph
        path.write_text(f"{heading}\n\n{path.read_text(encoding='utf-8')}", encoding="utf-8")
    shutil.copy(shared / "00.txt", shared / "copy.txt")
    domain = {"sources": [{"kind": "files", "glob": f"{shared}/*.txt"}]}
    store = build_store(make_mix(name="shared", domains={"shared": domain}), tmp_path, lambda _: None)
    seen: dict[str, str] = {}
    for (split, _), texts in decoded(store).items():
        for text in texts:
            for part in {normalise(part) for part in text.split("\n\n")}:
                assert seen.setdefault(part, split) == split
    figures = store.manifest["domains"]["shared"]["deduplication"]
    assert (figures["duplicate_documents"], figures["duplicate_paragraphs"]) == (1, 59)


def test_counts_and_manifest_agree_with_the_tokens(store: Store):
    for split in SPLITS:
        expected_DV = np.zeros((len(store.domains), store.vocab_size), dtype=np.int64)
        for number, domain in enumerate(store.domains):
            tokens = store.tokens_of(split, domain)
            np.add.at(expected_DV[number], np.asarray(tokens), 1)
            recorded = store.manifest["domains"][domain]["splits"][split]
            assert recorded["tokens"] == len(tokens)
            assert recorded["documents"] == np.count_nonzero(np.asarray(tokens) == END_OF_DOCUMENT)
        counts_DV = store.token_counts(split)
        assert counts_DV.dtype == np.int64 and np.array_equal(counts_DV, expected_DV)
        assert not counts_DV[:, 0].any(), "bytes stand in for unknown characters"


def test_a_finished_store_is_reused_and_weights_do_not_matter(make_mix: Callable[..., MixConfig], tmp_path: Path):
    mix = make_mix()
    messages: list[str] = []
    first = build_store(mix, tmp_path, messages.append)
    said = len(messages)
    heavier = mix.model_dump(mode="json")
    heavier["domains"]["latin"]["weight"] = 3
    second = build_store(MixConfig.model_validate(heavier), tmp_path, messages.append)
    assert second.path == first.path
    assert len(messages) == said
    assert store_path(make_mix(vocab_size=600), tmp_path) != first.path


def test_the_same_mix_gives_the_same_store(make_mix: Callable[..., MixConfig], store: Store, tmp_path: Path):
    again = build_store(make_mix(), tmp_path, lambda _: None)
    for name in ("tokens.bin", "documents.npy", "tokenizer.model"):
        assert (again.path / name).read_bytes() == (store.path / name).read_bytes()


def test_unlabelled_domains_carry_minus_one(make_mix: Callable[..., MixConfig], tmp_path: Path):
    mix = make_mix().model_dump(mode="json")
    mix["domains"]["greek"]["labelled"] = False
    assert build_store(MixConfig.model_validate(mix), tmp_path, lambda _: None).labels == (0, -1, 2)


def copy_of(store: Store, folder: Path) -> Path:
    return Path(shutil.copytree(store.path, folder / "copy"))


def test_a_truncated_store_is_refused(store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    content = (path / "tokens.bin").read_bytes()
    (path / "tokens.bin").write_bytes(content[:-2])
    with pytest.raises(
        DataError, match=rf"tokens.bin has {len(content) - 2:,} bytes, expected {len(content):,}; delete"
    ):
        Store.open(path)


@pytest.mark.parametrize(
    "name", ["documents.npy", "token_counts.npy", "tokenizer.model", "manifest.json", "tokens.bin"]
)
def test_a_missing_file_is_named(name: str, store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    (path / name).unlink()
    with pytest.raises(DataError, match=f"{name} (is missing|has 0 bytes)"):
        Store.open(path)


@pytest.mark.parametrize(
    "name", ["header.json", "documents.npy", "token_counts.npy", "tokenizer.model", "manifest.json", "tokens.bin"]
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_one_changed_bit_is_noticed(name: str, share: float, store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    content = bytearray((path / name).read_bytes())
    content[int(share * len(content))] ^= 2
    (path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} is (not the one that the store was built with|no JSON)"):
        Store.open(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff", b"{}"])
def test_a_header_of_another_form_is_refused(content: bytes, store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    (path / "header.json").write_bytes(content)
    with pytest.raises(DataError, match=r"(is damaged: header\.json is no JSON|has store format None)"):
        Store.open(path)


def test_a_store_of_an_earlier_version_has_fewer_checksums(store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    header = json.loads((path / "header.json").read_text())
    del header["sha256"]["tokens.bin"], header["sha256_of_the_rest"]
    (path / "header.json").write_text(json.dumps(header))
    assert Store.open(path).domains == store.domains


def test_a_half_written_store_is_refused(store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    header = (path / "header.json").read_text()
    (path / "header.json").write_text(header[: len(header) // 2])
    with pytest.raises(DataError, match=r"header\.json is no JSON"):
        Store.open(path)
    (path / "header.json").unlink()
    with pytest.raises(DataError, match=r"is no token store \(no header\.json\)"):
        Store.open(path)


def test_a_tokenizer_that_does_not_fit_is_refused(store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    other = train_tokenizer({"all": [text for texts in decoded(store).values() for text in texts]}, 600, 100_000, 0.4)
    (path / "tokenizer.model").write_bytes(other)
    with pytest.raises(DataError, match=r"tokenizer\.model is not the one that the store was built with"):
        Store.open(path)
    header = json.loads((path / "header.json").read_text())
    del header["sha256"]["tokenizer.model"], header["sha256_of_the_rest"]
    (path / "header.json").write_text(json.dumps(header))
    with pytest.raises(DataError, match="the tokenizer has 600 pieces, the tokens were written for 512"):
        Store.open(path)


def test_another_format_is_refused(store: Store, tmp_path: Path):
    path = copy_of(store, tmp_path)
    header = json.loads((path / "header.json").read_text())
    (path / "header.json").write_text(json.dumps(header | {"format": 99}))
    with pytest.raises(DataError, match="has store format 99, this version reads"):
        Store.open(path)


def test_a_build_that_was_cut_off_is_built_again(make_mix: Callable[..., MixConfig], tmp_path: Path):
    path = store_path(make_mix(), tmp_path)
    left_behind = path.with_name(f".{path.name}.building")
    left_behind.mkdir(parents=True)
    (left_behind / "tokens.bin").write_bytes(b"half")
    assert len(build_store(make_mix(), tmp_path, lambda _: None).tokens) > 0
    assert not left_behind.exists()


@pytest.mark.parametrize(
    "place",
    [(build, "write_store"), (cache.np, "savez"), (ArrowWriter, "write_table"), (loading, "encode_batch")],
)
def test_a_full_disk_is_one_clear_line(
    place: tuple[object, str], make_mix: Callable[..., MixConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fill_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*place, fill_disk)
    with pytest.raises(DataError, match="is full: free some space or choose another cache_dir"):
        build_store(make_mix(), tmp_path, lambda _: None)


def test_wrong_names_are_answered_with_the_right_ones(store: Store):
    with pytest.raises(DataError, match=r"no split 'test' .*Available: train, validation, tuning"):
        store.tokens_of("test", 0)
    with pytest.raises(DataError, match="no split 'test'"):
        store.token_counts("test")
    with pytest.raises(DataError, match=r"no domain 'latni' .*Available: latin, greek, digits"):
        store.tokens_of("train", "latni")


def test_a_mix_that_nothing_can_be_read_of(tmp_path: Path):
    source = {"kind": "files", "glob": str(tmp_path / "nothing" / "*.txt")}
    mix = MixConfig.model_validate({"name": "empty", "domains": {"a": {"sources": [source]}}})
    with pytest.raises(DataError, match="domain 'a' of the mix 'empty': no file matches"):
        build_store(mix, tmp_path, lambda _: None)
    optional = mix.model_copy(update={"domains": {"a": mix.domains["a"].model_copy(update={"optional": True})}})
    with pytest.raises(DataError, match="no domain of the mix 'empty' can be read; first reason: no file matches"):
        build_store(optional, tmp_path, lambda _: None)


def test_a_vocabulary_too_large_for_the_text(make_mix: Callable[..., MixConfig], tmp_path: Path):
    with pytest.raises(DataError, match="vocab_size 100000 is too large for"):
        build_store(make_mix(vocab_size=100_000), tmp_path, lambda _: None)


@pytest.mark.parametrize("text", ["  indented\n\n\tTab  two spaces ", "日本語 – emoji 🙂", "\u0000 control", "１２ ﬁ"])
def test_the_tokenizer_loses_nothing(store: Store, text: str):
    tokenizer = load_tokenizer(store.tokenizer_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text
