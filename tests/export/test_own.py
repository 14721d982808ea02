"""Models of our own classes: loaded by transformers, they compute what ours do, and write what ours do."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_testbed.launcher.config.model_size import special_ids
from moe_testbed.launcher.export import modeling_moe_testbed
from moe_testbed.launcher.export.card import auto_class
from moe_testbed.launcher.export.check import arguments
from moe_testbed.launcher.export.own import own_state, state_of
from moe_testbed.model.decoding.greedy import unlabelled, write_greedily
from tests.export import cases

Exported = Callable[[Mapping[str, Any]], tuple[Path, str]]

BIAS = {"loss_free_bias": {"update_rate": 0.1}}
SENTINELS = {**cases.BOTH, "objective": {"name": "denoising", "rate": 0.3, "mark": "sentinel", "target": "spans"}}
MODELS: dict[str, Any] = {
    "dense_seq2seq": cases.dense(cases.BOTH),
    "seq2seq": cases.with_routing(cases.BOTH, {"name": "top_k"}, cases.PLAIN),
    "three_tables": cases.dense(SENTINELS, embeddings="separate"),
    "encoder": cases.with_routing(cases.ENCODER, {"name": "top_k", "normalise": False}),
    "hash": cases.with_routing(cases.BOTH, {"name": "hash"}),
    "bias": cases.with_routing({}, {"name": "top_k"}, BIAS),
    "bias_on_logits": cases.with_routing({}, {"name": "top_k_softmax"}, BIAS),
    "sigmoid": cases.with_routing(cases.ENCODER, {"name": "sigmoid", "route_scale": 2.5}, BIAS),
    "shared": cases.with_routing({}, {"name": "noisy_top_k"}, moe={**cases.MOE, "num_shared_experts": 1}),
    "some_layers": cases.with_routing({}, {"name": "top_k"}, num_layers=3, moe={**cases.MOE, "every": 2}),
    "two_widths": cases.dense({}, num_layers=2, dense_hidden_size=24, moe={**cases.MOE, "every": 2}),
}
MODELS["one_decision"] = {**MODELS["bias"], "routing": {**MODELS["bias"]["routing"], "depth": "global"}}


@pytest.fixture(params=MODELS)
def parts(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]


def load(folder: Path, parts: Mapping[str, Any]) -> Any:
    architecture = parts.get("model", {}).get("architecture", "causal")
    load_class = getattr(transformers, auto_class(architecture))
    return load_class.from_pretrained(folder, trust_remote_code=True).eval()


def test_it_computes_what_the_run_does(parts: Any, exported: Exported, train_run: Any) -> None:
    folder, class_name = exported(parts)
    run, ours = cases.opened(train_run(parts))
    theirs = load(folder, parts)
    assert type(theirs).__name__ == class_name and class_name.startswith("MoeTestbedFor")
    texts = cases.texts_for(run, ours)
    with torch.no_grad():
        together = theirs(**arguments(texts)).logits
        for row in range(len(texts.token_ids_BL)):
            alone = cases.one_text(texts, row)
            logits = ours.logits(alone)
            assert float(logits.abs().max()) > 0.1
            for found in (together[row : row + 1, : logits.shape[1]], theirs(**arguments(alone)).logits):
                assert cases.largest_difference(found[..., : logits.shape[-1]], logits) < 1e-5
                assert float(found[..., logits.shape[-1] :].sum()) <= 0


@pytest.mark.parametrize("name", ["seq2seq", "three_tables", "hash"])
def test_it_writes_what_the_run_does(name: str, exported: Exported, train_run: Any) -> None:
    parts = MODELS[name]
    run, ours = cases.opened(train_run(parts))
    read = cases.texts_for(run, ours).encoder
    start = special_ids(run.config, run.store.vocab_size).start
    theirs = load(exported(parts)[0], parts)
    length = theirs.generation_config.max_length
    found = theirs.generate(input_ids=read.token_ids_BL, attention_mask=read.valid_BL.long())
    expected = write_greedily(ours, torch.full((len(read.token_ids_BL), 1), start), length, end=1, read=read)
    assert found.tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) > 1


@pytest.mark.parametrize("name", ["bias", "some_layers"])
def test_it_continues_as_the_run_does(name: str, exported: Exported, train_run: Any) -> None:
    parts = MODELS[name]
    _, ours = cases.opened(train_run(parts))
    theirs = load(exported(parts)[0], parts)
    begun = torch.randint(2, 200, (4, 5), generator=torch.Generator().manual_seed(2))
    expected = write_greedily(ours, begun, 16, end=1)
    assert theirs.generate(input_ids=begun).tolist() == expected.tolist()
    # Padding in front changes nothing but the places, which are relative.
    padded = torch.cat([torch.zeros(4, 3, dtype=torch.int64), begun], dim=1)
    mask = (torch.arange(8) >= 3).long().expand(4, 8)
    with torch.no_grad():
        first = theirs(input_ids=padded, attention_mask=mask).logits[:, -1]
        assert cases.largest_difference(first, ours.logits(unlabelled(begun))[:, -1]) < 1e-5


def test_it_can_be_trained_on(exported: Exported, train_run: Any) -> None:
    parts = MODELS["seq2seq"]
    run, ours = cases.opened(train_run(parts))
    theirs = load(exported(parts)[0], parts).train()
    texts = cases.one_text(cases.texts_for(run, ours), 0)
    labels = texts.token_ids_BL[:, 1:]
    given = arguments(texts)
    by_labels = theirs(input_ids=given["input_ids"], labels=labels)
    assert by_labels.logits.shape[:2] == labels.shape
    by_labels.loss.backward()
    weights = dict(theirs.named_parameters())
    unused = [name for name, weight in weights.items() if weight.grad is None]
    assert unused == []


def test_the_weights_come_back_under_our_names(parts: Any, train_run: Any) -> None:
    _, model = cases.opened(train_run(parts))
    of_training = "balancing.", "noise_scorer."
    expected = {key: value for key, value in model.state_dict().items() if not any(map(key.__contains__, of_training))}
    found = own_state(state_of(model), model)
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=0)


def test_the_file_stands_alone() -> None:
    tree = ast.parse(Path(str(modeling_moe_testbed.__file__)).read_text(encoding="utf-8"))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} == {"__future__", "typing", "torch", "transformers"}
