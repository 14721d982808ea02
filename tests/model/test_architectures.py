"""Encoders and encoder-decoders against loops over single tokens, and who may see whom."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_testbed.data.objectives import Denoising, Masked
from moe_testbed.launcher.config.flops import StepFlops, stack_flops
from moe_testbed.model.config import ModelConfig
from moe_testbed.model.language_model import LanguageModel
from moe_testbed.model.output_layer import NO_TARGET, target_loss
from moe_testbed.model.stack import Block
from moe_testbed.model.transformer import Attention, CrossAttention, RMSNorm
from moe_testbed.routing.records import RoutingContext

MakeModel = Callable[..., LanguageModel]
V = 37
LATER = {"atol": 2e-5, "rtol": 2e-5}


def context_of(
    tokens_BL: Tensor, valid_BL: Tensor | None = None, encoder: RoutingContext | None = None
) -> RoutingContext:
    B, L = tokens_BL.shape
    sequence_B = torch.arange(B)
    shape = (B, L)
    return RoutingContext(
        token_ids_BL=tokens_BL,
        domain_BL=(sequence_B % 3)[:, None].expand(shape).contiguous(),
        document_BL=sequence_B[:, None].expand(shape).contiguous(),
        position_BL=torch.arange(L).expand(shape).contiguous(),
        sequence_B=sequence_B,
        valid_BL=valid_BL,
        encoder=encoder,
    )


def make_input(padded: bool = True) -> tuple[RoutingContext, Tensor]:
    """Three texts of 9 tokens for a decoder, and for the encoder 11, 8 and 6 of 11."""
    generator = torch.Generator().manual_seed(11)
    read_BL = torch.randint(V, (3, 11), generator=generator)
    valid_BL = torch.arange(11) < torch.tensor([11, 8, 6])[:, None] if padded else None
    written_BL = torch.randint(V, (3, 10), generator=generator)
    return context_of(written_BL[:, :-1], encoder=context_of(read_BL, valid_BL)), written_BL[:, 1:]


def rms_norm(norm: RMSNorm, x_M: Tensor) -> Tensor:
    return x_M / (x_M.pow(2).mean() + norm.epsilon).sqrt() * norm.weight


def turned(x_P: Tensor, place: int, theta: float = 10_000.0) -> Tensor:
    half = len(x_P) // 2
    angle_X = place * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos_X, sin_X = angle_X.cos(), angle_X.sin()
    first_X, second_X = x_P[:half], x_P[half:]
    return torch.cat([first_X * cos_X - second_X * sin_X, second_X * cos_X + first_X * sin_X])


def attend(query_M: Tensor, place: int, keys: list[tuple[int, Tensor, Tensor]], heads: int) -> Tensor:
    """What one token takes from others, each given as (place, key, value)."""
    mixed = []
    width = len(query_M) // heads
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.stack([turned(query_M[part], place) @ turned(key[part], at) for at, key, _ in keys])
        shares = (scores / math.sqrt(width)).softmax(0)
        mixed.append(sum(share * value[part] for share, (_, _, value) in zip(shares, keys, strict=True)))
    return torch.cat(mixed)  # type: ignore[arg-type]


def self_attention(layer: Attention, x_LM: Tensor, seen: list[int], causal: bool) -> Tensor:
    query_LM, key_LM, value_LM = (x_LM @ layer.query_key_value.weight.T).chunk(3, dim=1)
    rows = []
    for place in range(len(x_LM)):
        keys = [(at, key_LM[at], value_LM[at]) for at in seen if not causal or at <= place]
        rows.append(attend(query_LM[place], place, keys, layer.num_heads) @ layer.output.weight.T)
    return torch.stack(rows)


def cross_attention(layer: CrossAttention, x_LM: Tensor, memory_XM: Tensor, seen: list[int]) -> Tensor:
    key_XM, value_XM = (memory_XM @ layer.key_value.weight.T).chunk(2, dim=1)
    keys = [(at, key_XM[at], value_XM[at]) for at in seen]
    query_LM = x_LM @ layer.query.weight.T
    return torch.stack(
        [attend(query, place, keys, layer.num_heads) @ layer.output.weight.T for place, query in enumerate(query_LM)]
    )


def naive_stack(
    blocks: list[Block], norm: RMSNorm, x_LM: Tensor, seen: list[int], memory: tuple[Tensor, list[int]] | None
) -> Tensor:
    """A dense stack of one sequence, token by token."""
    for block in blocks:
        normed = torch.stack([rms_norm(block.attention_norm, x) for x in x_LM])
        x_LM = x_LM + self_attention(block.attention, normed, seen, block.attention.causal)
        if memory is not None:
            assert block.cross_attention is not None
            normed = torch.stack([rms_norm(block.cross_attention_norm, x) for x in x_LM])
            x_LM = x_LM + cross_attention(block.cross_attention, normed, *memory)
        normed = torch.stack([rms_norm(block.feed_forward_norm, x) for x in x_LM])
        dense = block.dense
        x_LM = x_LM + (F.silu(normed @ dense.gate.weight.T) * (normed @ dense.up.weight.T)) @ dense.down.weight.T
    return torch.stack([rms_norm(norm, x) for x in x_LM])


def naive_encoder_decoder(model: LanguageModel, context: RoutingContext, targets_BL: Tensor) -> Tensor:
    assert context.encoder is not None
    encoder, decoder = model.stacks["encoder"], model.stacks["decoder"]
    table = model.embedding.weight
    losses = []
    for b in range(len(targets_BL)):
        valid_BL = context.encoder.valid_BL
        seen = list(range(11)) if valid_BL is None else valid_BL[b].nonzero()[:, 0].tolist()
        read = table[context.encoder.token_ids_BL[b]]
        memory_XM = naive_stack(encoder.layers, encoder.final_norm, read, seen, None)
        written = table[context.token_ids_BL[b]]
        hidden_LM = naive_stack(decoder.layers, decoder.final_norm, written, list(range(9)), (memory_XM, seen))
        losses.append(F.cross_entropy(hidden_LM @ table.T, targets_BL[b], reduction="none"))
    return torch.stack(losses)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_decoder_equals_a_loop_over_tokens_with_its_gradients(padded: bool, make_model: MakeModel) -> None:
    model = make_model(architecture="encoder_decoder", dense_baseline=True).double()
    context, targets_BL = make_input(padded)
    output = model(context, targets_BL)
    naive_BL = naive_encoder_decoder(model, context, targets_BL)
    torch.testing.assert_close(output.cross_entropy_BL.double(), naive_BL, **LATER)
    output.loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    naive_BL.mean().backward()
    for name, parameter in model.named_parameters():
        assert ours[name] is not None and parameter.grad is not None
        torch.testing.assert_close(ours[name], parameter.grad, **LATER, msg=lambda text, name=name: f"{name}: {text}")


def test_an_encoder_equals_a_loop_over_tokens(make_model: MakeModel) -> None:
    model = make_model(architecture="encoder", dense_baseline=True).double()
    context, _ = make_input()
    assert context.encoder is not None and context.encoder.valid_BL is not None
    hidden_BLM = model.encode(context.encoder)
    stack = model.stacks["encoder"]
    for b in range(3):
        seen = context.encoder.valid_BL[b].nonzero()[:, 0].tolist()
        read = model.embedding.weight[context.encoder.token_ids_BL[b]]
        naive = naive_stack(stack.layers, stack.final_norm, read, seen, None)
        torch.testing.assert_close(hidden_BLM[b, seen], naive[seen], **LATER)


def changed(context: RoutingContext, place: int) -> RoutingContext:
    tokens_BL = context.token_ids_BL.clone()
    tokens_BL[:, place] = (tokens_BL[:, place] + 1) % V
    return replace(context, token_ids_BL=tokens_BL)


@pytest.mark.parametrize("dense", [False, True])
def test_who_sees_whom(dense: bool, make_model: MakeModel) -> None:
    """A token of the encoder changes all of them, but padding none; one of the decoder changes those from it on."""
    model = make_model(architecture="encoder_decoder", dense_baseline=dense).eval()
    context, _ = make_input()
    assert context.encoder is not None
    hidden_BLM, logits_BLV = model.encode(context.encoder), model.logits(context)
    early = changed(context.encoder, 2)
    different_BL = (model.encode(early) - hidden_BLM).abs().amax(-1) > 0
    assert bool(different_BL[0].all()) and bool(different_BL[1, :8].all())
    assert bool(((model.logits(replace(context, encoder=early)) - logits_BLV).abs().amax(-1) > 0).all())
    padding = changed(context.encoder, 10)
    same = model.logits(replace(context, encoder=padding))
    torch.testing.assert_close(same[1:], logits_BLV[1:])
    assert bool(((same[0] - logits_BLV[0]).abs().amax(-1) > 0).all())
    later = model.logits(changed(context, 5))
    torch.testing.assert_close(later[:, :5], logits_BLV[:, :5])
    assert bool(((later[:, 5:] - logits_BLV[:, 5:]).abs().amax(-1) > 0).all())


def test_each_stack_routes_and_balances_by_itself(make_model: MakeModel) -> None:
    routing = {
        "router": {"name": "top_k"},
        "balance": {"loss_free_bias": {"update_rate": 0.01}},
        "encoder": {"router": {"name": "expert_choice"}, "balance": {"z_loss": {"coefficient": 0.1}}},
    }
    model = make_model(routing, architecture="encoder_decoder", decoder={"num_layers": 1})
    context, targets_BL = make_input()
    output = model(context, targets_BL)
    assert [type(router).__name__ for router in model.routers()] == ["ExpertChoice", "ExpertChoice", "TopK"]
    assert [router.setting.layer for router in model.routers()] == [0, 1, 2]
    tokens = [layer.context.token_ids_BL.numel() for layer in output.layers]
    assert tokens == [33, 33, 27]
    assert sorted(output.balance) == ["encoder/z_loss"]
    balancing = model.stacks["decoder"].balancing
    assert balancing is not None and balancing.step_counts_YE.sum().item() == 27 * 2
    assert output.loss > output.cross_entropy


@pytest.mark.parametrize(("encoder", "decoder"), [(True, False), (False, True), (True, True)])
def test_either_stack_may_be_dense(encoder: bool, decoder: bool, make_model: MakeModel) -> None:
    stacks = {"encoder": {"dense_baseline": encoder}, "decoder": {"dense_baseline": decoder}}
    model = make_model(architecture="encoder_decoder", **stacks)
    output = model(*make_input())
    assert len(output.layers) == model.config.num_moe_layers == 2 * (2 - encoder - decoder)
    assert len(model.moe_layers()) == len(output.layers)


def test_barred_experts_are_told_of_both_stacks_in_order(make_model: MakeModel) -> None:
    model = make_model(architecture="encoder_decoder").eval()
    context, targets_BL = make_input()
    barred_YBE = torch.zeros(4, 3, 12, dtype=torch.bool)
    barred_YBE[1, :, :4] = True
    barred_YBE[2, :, 4:8] = True
    output = model(replace(context, barred_YBE=barred_YBE), targets_BL)
    used = [set(layer.decision.expert_ids_TK.unique().tolist()) for layer in output.layers]
    assert not used[1] & {0, 1, 2, 3} and not used[2] & {4, 5, 6, 7}
    assert used[0] & {0, 1, 2, 3} and used[3] & {4, 5, 6, 7}


@pytest.mark.parametrize("embeddings", ["shared", "equal_start", "separate"])
def test_tables(embeddings: str, make_model: MakeModel) -> None:
    model = make_model(architecture="encoder_decoder", embeddings=embeddings)
    tables = {name: parameter for name, parameter in model.named_parameters() if "embedding" in name}
    if embeddings == "shared":
        assert list(tables) == ["embedding.weight"]
        return
    assert set(tables) == {"embedding.weight", "decoder_embedding.weight", "output_embedding.weight"}
    alike = [torch.equal(table, model.embedding.weight) for table in tables.values()]
    assert all(alike) if embeddings == "equal_start" else alike.count(True) == 1
    model(*make_input()).loss.backward()
    assert all(table.grad is not None and bool(table.grad.any()) for table in tables.values())


@pytest.mark.parametrize("embeddings", ["shared", "separate"])
def test_what_is_frozen_has_no_gradient_and_keeps_no_state(embeddings: str, make_model: MakeModel) -> None:
    routing = {
        "router": {"name": "noisy_top_k"},
        "balance": {
            "load_balancing_loss": {"coefficient": 1.0, "scope": "micro_batch"},
            "loss_free_bias": {"update_rate": 0.1},
        },
    }
    model = make_model(routing, architecture="encoder_decoder", embeddings=embeddings)
    model.freeze(["encoder"])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    output = model(*make_input())
    output.loss.backward()
    model.finish_step()
    assert sorted(output.balance) == ["decoder/load_balancing_loss"]
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (model.part_of(name) == "encoder"), name
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)
    assert not model.stacks["encoder"].training and model.stacks["decoder"].training
    model.eval().train()
    assert not model.stacks["encoder"].training
    model.freeze([])
    assert model.stacks["encoder"].training
    model(*make_input()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_loss_of_some_places_is_the_mean_of_the_sequences_means() -> None:
    hidden_BLM = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight_VM = torch.randn(11, 8, dtype=torch.float64, requires_grad=True)
    targets_BL = torch.tensor([[3, -1, -1, 4, -1], [-1, 9, -1, -1, -1], [0, 1, 2, 3, 4]])
    loss, cross_entropy_BL, correct_BL = target_loss(hidden_BLM, weight_VM, targets_BL, None)
    means, expected_BL = [], torch.zeros(3, 5, dtype=torch.float64)
    for b in range(3):
        of_places = []
        for place in range(5):
            target = int(targets_BL[b, place])
            logits_V = weight_VM @ hidden_BLM[b, place]
            if target == NO_TARGET:
                assert not correct_BL[b, place]
                continue
            of_places.append(logits_V.logsumexp(0) - logits_V[target])
            expected_BL[b, place] = of_places[-1].detach()
            assert bool(correct_BL[b, place]) == (int(logits_V.argmax()) == target)
        means.append(torch.stack(of_places).mean())
    expected = torch.stack(means).mean()
    torch.testing.assert_close(loss.double(), expected, **LATER)
    torch.testing.assert_close(cross_entropy_BL.double(), expected_BL, **LATER)
    ours = torch.autograd.grad(loss, [hidden_BLM, weight_VM], retain_graph=True)
    for one, other in zip(ours, torch.autograd.grad(expected, [hidden_BLM, weight_VM]), strict=True):
        torch.testing.assert_close(one, other, **LATER)
    valid_BL = torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    without, *_ = target_loss(hidden_BLM, weight_VM, targets_BL, valid_BL)
    torch.testing.assert_close(without.double(), (means[0] + means[2]) / 2, **LATER)


def counted(model: LanguageModel, context: RoutingContext, targets_BL: Tensor) -> int:
    """torch's own count; only its math kernel tells of attention on a CPU, and that computes the whole of a causal
    square."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(context, targets_BL).loss.backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("frozen", [(), ("encoder",)])
@pytest.mark.parametrize("embeddings", ["shared", "separate"])
def test_the_ledger_is_torchs_count(frozen: tuple[str, ...], embeddings: str, make_model: MakeModel) -> None:
    model = make_model(architecture="encoder_decoder", dense_baseline=True, embeddings=embeddings)
    model.freeze(frozen)
    context, targets_BL = make_input(padded=False)
    stacks = model.stacks
    still = frozenset(frozen)
    lengths = {"encoder": 11, "decoder": 9}
    ours = sum(3 * stack_flops(stack, lengths[name], 11, still) for name, stack in stacks.items())
    step = StepFlops(model, Denoising(), 9, 3)
    ours += step.output(still, targets_BL.numel())
    # The other half of the causal squares: two layers of 4 L^2 M / 2 forward, twice that backward, three sequences.
    ours += 3 * 2 * 3 * 2 * 9 * 9 * 16
    assert ours == pytest.approx(counted(model, context, targets_BL), rel=0.01)


def test_the_ledger_of_an_encoder_is_torchs_count(make_model: MakeModel) -> None:
    model = make_model(architecture="encoder", dense_baseline=True)
    context, _ = make_input(padded=False)
    assert context.encoder is not None
    targets_BL = context.encoder.token_ids_BL
    step = StepFlops(model, Masked(), 11, 3)
    ours = sum(step.stacks().values()) + step.output(frozenset(), targets_BL.numel())
    assert ours == pytest.approx(counted(model, context.encoder, targets_BL), rel=0.01)


def test_a_ledger_with_experts_counts_those_that_a_token_chooses(make_model: MakeModel) -> None:
    """The dense baseline has as much active; the router comes on top."""
    dense, sparse = (make_model(architecture="encoder", dense_baseline=value) for value in (True, False))
    of_dense, of_sparse = (sum(StepFlops(model, Masked(), 11, 3).stacks().values()) for model in (dense, sparse))
    assert of_sparse - of_dense == 2 * 6 * 33 * 16 * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": {"num_layers": 3}}, r"model\.decoder is given, but model\.architecture is causal"),
        ({"embeddings": "separate"}, r"model\.embeddings is separate, but a causal model has one table"),
        (
            {"architecture": "encoder", "decoder": {"num_layers": 3}},
            r"model\.decoder is given, but model\.architecture is encoder, which has no such part",
        ),
    ],
)
def test_parts_that_an_architecture_lacks_are_refused(options: dict[str, Any], message: str) -> None:
    moe = {"num_experts": 4, "top_k": 1, "expert_hidden_size": 8}
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"num_layers": 2, "hidden_size": 16, "num_heads": 2, "moe": moe, **options})
