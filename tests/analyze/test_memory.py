"""What is held does not grow with the tokens that are read."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from moe_testbed.launcher.analyze.families import FAMILIES
from moe_testbed.launcher.analyze.passages import Tokens, cut_passages
from moe_testbed.launcher.analyze.recorder import Recorder
from tests.analyze import models

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def tensor_bytes() -> int:
    """Of all tensors that are alive."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), torch.Tensor)
    }
    return sum(storages.values())


def recorded(model: Any, per_domain: int) -> tuple[dict[str, Any], list[int], int]:
    """The arrays, the bytes of all tensors when each batch is read, and the number of tokens."""
    # A passage a document.
    passages = cut_passages(models.make_documents(per_domain, 60), 30, per_domain)
    recorder = Recorder(model, FAMILIES["mixtral"], passages, Tokens(models.make_tokenizer(), 16), 64, CPU)
    seen: list[int] = []
    handle = model.model.register_forward_pre_hook(lambda module, inputs: seen.append(tensor_bytes()))
    arrays = recorder.run().arrays()
    handle.remove()
    return arrays, seen, int(arrays["tokens_D"].sum())


@pytest.fixture(scope="module")
def runs() -> list[tuple[dict[str, Any], list[int], int]]:
    model = models.make_model("mixtral")
    # Both have 64 clusters a domain.
    return [recorded(model, per_domain) for per_domain in (64, 640)]


def test_ten_times_the_tokens_have_tables_of_the_same_size(
    runs: list[tuple[dict[str, Any], list[int], int]],
) -> None:
    (few, _, tokens), (many, _, more_tokens) = runs
    assert more_tokens > 9 * tokens
    assert {name: array.shape for name, array in few.items() if not name.endswith("_N")} == {
        name: array.shape for name, array in many.items() if not name.endswith("_N")
    }
    # One number a passage for its loss, its domain and its cluster.
    for name in ("sequence_loss_N", "sequence_domain_N", "sequence_cluster_N"):
        assert many[name].nbytes == 10 * few[name].nbytes == 8 * 4 * 640


def test_ten_times_the_tokens_hold_no_more_tensors(runs: list[tuple[dict[str, Any], list[int], int]]) -> None:
    (_, few, _), (_, many, _) = runs
    per_passage = 5 * 8  # its loss, number of tokens, domain, cluster and shuffled label
    assert max(many) <= max(few) + per_passage * 4 * (640 - 64)
    # Nor does it grow from batch to batch.
    assert max(many[1:]) - min(many[1:]) < np.mean(many) / 100
