"""The tokenizer of an export gives a text the ids that the mix's own gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import transformers
from hypothesis import given, settings

from moe_testbed.data.build import store_path
from moe_testbed.data.config import MixConfig
from moe_testbed.data.objectives import SpecialIds
from moe_testbed.data.tokens.store import Store
from moe_testbed.data.tokens.tokenizer import load_tokenizer, train_tokenizer
from moe_testbed.launcher.export.tokenizer import END, MASK, PADDING, START, make_tokenizer

PIECES = 296
IDS = SpecialIds(PIECES, sentinels=2)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = {"one": ["aab aba  abab baab\n" * 40, "    if aa:\n\t\tbb = 'αβ'\n" * 40]}
    path.write_bytes(train_tokenizer(texts, PIECES, 100_000, 0.5))
    return path


@pytest.fixture(scope="module")
def both(model_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("written")
    make_tokenizer(model_file, "encoder_decoder", IDS, 64).save_pretrained(folder)
    return load_tokenizer(model_file), transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(alphabet="ab \n\tαβ'=:▁"), st.text(st.characters(exclude_categories=("Cs",)))))
def test_ids_and_text_are_the_mixs_own(both: tuple[Any, Any], text: str) -> None:
    ours, theirs = both
    ids = theirs(text).input_ids
    assert ids == ours.encode(text)
    assert theirs.decode(ids) == text.replace("▁", " ")


def test_special_tokens_have_the_models_ids(both: tuple[Any, Any]) -> None:
    _, tokenizer = both
    assert tokenizer(f"{PADDING}{END}<|gap_0|><|gap_1|>{START}{MASK}").input_ids == [0, 1, *range(PIECES, PIECES + 4)]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (0, 1, IDS.mask)
    # How the mix's tokenizer calls them is text like any other.
    assert min(tokenizer("</s><unk>").input_ids) > 1
    assert tokenizer.decode(tokenizer(f"{START}ab{END}").input_ids, skip_special_tokens=True) == "ab"


def test_texts_are_padded_where_the_model_expects_it(both: tuple[Any, Any]) -> None:
    _, tokenizer = both
    batch = tokenizer(["a", "a b c α"], padding=True)
    assert batch.input_ids[0][-1] == 0 and batch.attention_mask[0][-1] == 0 and batch.attention_mask[0][0] == 1
    assert tokenizer.model_max_length == 64


def test_a_store_can_be_read_with_it(own_data: dict[str, Any], train_run: Callable[[Mapping[str, Any]], Path]) -> None:
    path = store_path(MixConfig.model_validate(own_data["mix"]), Path(own_data["cache_dir"]))
    store = Store.open(path)
    tokenizer = make_tokenizer(store.tokenizer_path, "causal", SpecialIds(store.vocab_size), 16)
    for document in range(len(store.document_starts) - 1):
        first, end = store.document_starts[document : document + 2]
        ids = store.tokens[first : end - 1].tolist()
        assert tokenizer(tokenizer.decode(ids)).input_ids == ids
