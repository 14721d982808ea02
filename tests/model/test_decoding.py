"""Greedy decoding against one text at a time, with all logits computed anew for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_testbed.launcher.config.experiment import ExperimentConfig
from moe_testbed.launcher.config.model_size import first_setting, language_model, special_ids
from moe_testbed.model.decoding.greedy import unlabelled, write_greedily
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.routing.records import RoutingContext
from tests.distributed import corpus

PIECES = 40
MIX = {"name": "x", "vocab_size": 512, "domains": {"a": {"sources": [{"kind": "files", "glob": "*"}]}}}


def make_model(**parts: Any) -> tuple[LanguageModel, int]:
    """A model that is not trained, and its start id."""
    config = ExperimentConfig.model_validate(corpus.make_experiment({"mix": MIX, "sequence_length": 12}, **parts))
    setting = first_setting(config)
    counts = torch.ones(len(setting.domains), PIECES, dtype=torch.int64)
    model = language_model(config, PIECES, type(setting)(**{**vars(setting), "token_counts_DV": counts}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model.eval(), special_ids(config, PIECES).start


def one_by_one(model: LanguageModel, begun: Tensor, length: int, end: int | None, read: RoutingContext | None) -> Any:
    """The naive loop: one text, all stacks anew for every token."""
    written = begun.tolist()
    while len(written) < length and (end is None or written[-1] != end or len(written) == len(begun)):
        context = unlabelled(torch.tensor([written]), encoder=read)
        written.append(int(model.logits(context)[0, -1].argmax()))
    return written + [0] * (length - len(written))


def test_a_causal_model_continues() -> None:
    model, _ = make_model()
    begun = torch.randint(2, PIECES, (6, 3), generator=torch.Generator().manual_seed(3))
    free = write_greedily(model, begun, 12)
    assert free.tolist() == [one_by_one(model, row, 12, None, None) for row in begun]
    # An id that some text writes early ends that one.
    end = int(free[0, 5])
    ended = write_greedily(model, begun, 12, end=end)
    expected = [one_by_one(model, row, 12, end, None) for row in begun]
    assert ended.tolist() == [row[: ended.shape[1]] for row in expected]
    assert ended.tolist() != free[:, : ended.shape[1]].tolist()


@pytest.mark.parametrize("dense", [True, False])
def test_a_decoder_writes_about_what_the_encoder_reads(dense: bool) -> None:
    parts: dict[str, Any] = {
        "model": {"architecture": "encoder_decoder", "dense_baseline": dense},
        "objective": {"name": "denoising", "rate": 0.4},
        "routing": {"router": {"name": "top_k"}, "balance": "none"},
    }
    model, start = make_model(**parts)
    texts = torch.randint(2, PIECES, (5, 8), generator=torch.Generator().manual_seed(4))
    lengths = torch.tensor([8, 6, 4, 2, 1])
    read = unlabelled(texts, torch.arange(8) < lengths[:, None])
    begun = torch.full((5, 1), start)
    found = write_greedily(model, begun, 12, read=read)
    expected = [
        one_by_one(model, begun[row], 12, None, unlabelled(texts[row : row + 1, : lengths[row]])) for row in range(5)
    ]
    assert found.tolist() == expected
    assert len({tuple(row) for row in expected}) > 1


def test_what_cannot_be_written_is_said() -> None:
    model, _ = make_model()
    with pytest.raises(ValueError, match="a text of 13 tokens is to be written, but the decoder has 12 positions"):
        write_greedily(model, torch.zeros(1, 1, dtype=torch.int64), 13)
    encoder, _ = make_model(model={"architecture": "encoder"}, objective={"name": "masked"})
    with pytest.raises(ValueError, match="an encoder writes no text"):
        write_greedily(encoder, torch.zeros(1, 1, dtype=torch.int64), 4)
