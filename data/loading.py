"""Tokens through `datasets`, cached on disk under the fingerprint of what decides them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moe_testbed.data.machine import usable_cores
from moe_testbed.data.tokens.store import FORMAT
from moe_testbed.data.tokens.tokenizer import encode_batch

if TYPE_CHECKING:
    from datasets import Dataset

BYTES_PER_PROCESS = 2_000_000
DOCUMENTS_PER_BATCH = 100


def fingerprint(*parts: Any) -> str:
    """Returns a short name of JSON values and of the store's format; equal values have equal names."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tokenise(texts: Sequence[str], tokenizer_path: Path, cache_dir: Path) -> list[npt.NDArray[np.uint32]]:
    """Returns the tokens of every text, each closed by the end-of-document piece. Large ones take all usable cores."""
    from datasets import Dataset, Features, List, Value

    processes = max(1, min(usable_cores(), sum(map(len, texts)) // BYTES_PER_PROCESS))
    # Process k gets the k-th part of the rows: dealing the texts out in turn gives each as much of every domain.
    order = [index for first in range(processes) for index in range(first, len(texts), processes)]
    digest = hashlib.sha256(tokenizer_path.read_bytes())
    for text in texts:
        digest.update(text.encode() + b"\0")
    name = fingerprint(digest.hexdigest(), processes)
    folder = cache_dir / "datasets" / "tokens"
    folder.mkdir(parents=True, exist_ok=True)
    with quiet_datasets():
        encoded = Dataset.from_dict({"text": [texts[index] for index in order]}).map(
            encode_batch,
            batched=True,
            batch_size=DOCUMENTS_PER_BATCH,
            fn_kwargs={"tokenizer_path": str(tokenizer_path)},
            remove_columns=["text"],
            features=Features({"tokens": List(Value("uint32"))}),
            cache_file_name=str(folder / f"{name}.arrow"),
            new_fingerprint=name,
            num_proc=processes if processes > 1 else None,
        )
    tokens: list[npt.NDArray[np.uint32]] = [np.empty(0, np.uint32)] * len(texts)
    for index, row in zip(order, arrow_rows(encoded), strict=True):
        tokens[index] = row
    return tokens


def arrow_rows(encoded: "Dataset") -> Iterator[npt.NDArray[np.uint32]]:
    """Yields the rows of the column `tokens`, without going through Python integers."""
    for chunk in encoded.data.column("tokens").chunks:
        values = chunk.values.to_numpy(zero_copy_only=True)
        offsets = chunk.offsets.to_numpy()
        for start, end in pairwise(offsets):
            yield values[start:end]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silences progress bars and notes of `datasets`; puts back what was set before."""
    import datasets

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
