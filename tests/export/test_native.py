"""Models that transformers has: loaded by it, they compute what ours do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.launcher.export.card import auto_class
from moe_testbed.launcher.export.conditions import form_of
from moe_testbed.launcher.export.native import own_state, state_of
from tests.export import cases

Exported = Callable[[Mapping[str, Any]], tuple[Path, str]]

CASES: dict[str, tuple[Any, str]] = {
    "encoder": (cases.dense(cases.ENCODER), "EuroBertForMaskedLM"),
    "encoder_untied": (cases.dense(cases.ENCODER, embeddings="separate"), "EuroBertForMaskedLM"),
    "causal": (cases.dense({}, rope_theta=500.0), "LlamaForCausalLM"),
    "experts": ({"routing": {"router": {"name": "top_k"}, "balance": cases.PLAIN}}, "MixtralForCausalLM"),
    "split": (
        cases.with_routing({}, {"name": "top_k_softmax"}, moe={**cases.MOE, "split": 2}),
        "MixtralForCausalLM",
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Any, str]:
    return CASES[request.param]


def test_it_computes_what_the_run_does(case: tuple[Any, str], exported: Exported, train_run: Any) -> None:
    parts, expected = case
    folder, class_name = exported(parts)
    assert class_name == expected
    run, ours = cases.opened(train_run(parts))
    theirs = getattr(transformers, auto_class(run.config.model.architecture)).from_pretrained(folder).eval()
    assert type(theirs).__name__ == expected
    texts = cases.texts_for(run, ours)
    with torch.no_grad():
        together = theirs(input_ids=texts.token_ids_BL, attention_mask=texts.valid_BL.long()).logits
        for row in range(len(texts.token_ids_BL)):
            alone = cases.one_text(texts, row)
            logits = ours.logits(alone)
            assert float(logits.abs().max()) > 0.1
            for found in (together[row : row + 1, : logits.shape[1]], theirs(alone.token_ids_BL).logits):
                assert cases.largest_difference(found[..., : logits.shape[-1]], logits) < 1e-5


def test_no_probability_goes_to_ids_that_no_text_has(exported: Exported, train_run: Any) -> None:
    parts = CASES["encoder"][0]
    run, ours = cases.opened(train_run(parts))
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(exported(parts)[0]).eval()
    text = cases.one_text(cases.texts_for(run, ours), 0)
    with torch.no_grad():
        found, expected = theirs(text.token_ids_BL).logits.softmax(-1), ours.logits(text).softmax(-1)
    pieces = run.store.vocab_size
    assert found.shape[-1] > pieces and float(found[..., pieces:].abs().max()) == 0
    assert cases.largest_difference(found[..., :pieces], expected) < 1e-6


def test_pipelines_run_on_it(exported: Exported, train_run: Any) -> None:
    parts = CASES["encoder"][0]
    run, ours = cases.opened(train_run(parts))
    folder, _ = exported(parts)
    fill = transformers.pipeline("fill-mask", model=str(folder))
    answers = fill("abc <|mask|>de")
    ids = torch.tensor([fill.tokenizer("abc <|mask|>de").input_ids])
    (place,) = (ids[0] == special_ids(run.config, run.store.vocab_size).mask).nonzero()[:, 0].tolist()
    text = cases.one_text(cases.texts_for(run, ours), 0)
    logits = ours.logits(replace(text, token_ids_BL=ids, domain_BL=ids, position_BL=ids, document_BL=None))
    assert [answer["token"] for answer in answers] == logits[0, place].topk(5).indices.tolist()


def test_the_weights_come_back_under_our_names(case: tuple[Any, str], train_run: Any) -> None:
    _, model = cases.opened(train_run(case[0]))
    form = form_of(model)
    expected = {key: tensor for key, tensor in model.state_dict().items() if "balancing." not in key}
    found = own_state(state_of(model, form), model, form)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
