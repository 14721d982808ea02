"""The output layer's loss and its gradients against a loop over tokens in float64.

Shape legend: T tokens, M model width, V token ids.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_testbed.model import output_layer
from moe_testbed.model.output_layer import token_loss

T, M, V = 150, 8, 40


def naive_cross_entropy(hidden_M: Tensor, weight_VM: Tensor, target: int) -> Tensor:
    """``-log softmax(W h)[target]``, written down."""
    logits_V = torch.stack([(row_M * hidden_M).sum() for row_M in weight_VM])
    largest = logits_V.max()
    return largest + (logits_V - largest).exp().sum().log() - logits_V[target]


def naive_loss(hidden_TM: Tensor, weight_VM: Tensor, targets_T: Tensor, shares_T: Tensor) -> tuple[Tensor, Tensor]:
    tokens = zip(hidden_TM, targets_T.tolist(), strict=True)
    cross_entropy_T = torch.stack([naive_cross_entropy(hidden_M, weight_VM, target) for hidden_M, target in tokens])
    return (cross_entropy_T * shares_T).sum(), cross_entropy_T


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens a block: the last block is not full."""
    monkeypatch.setitem(output_layer._BLOCK_NUMBERS, "cpu", 1)


def drawn(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets and shares, of which a fifth is 0."""
    draw = torch.Generator().manual_seed(0)
    hidden_TM, weight_VM = torch.randn(T, M, generator=draw), scale * torch.randn(V, M, generator=draw)
    shares_T = torch.rand(T, generator=draw) * (torch.rand(T, generator=draw) < 0.8)
    return hidden_TM, weight_VM, torch.randint(0, V, (T,), generator=draw), shares_T / shares_T.sum()


@pytest.mark.parametrize("scale", [1.0, 100.0], ids=["plain", "logits_of_hundreds"])
def test_loss_and_gradients_equal_a_loop_over_tokens(scale: float) -> None:
    hidden_TM, weight_VM, targets_T, shares_T = drawn(scale)
    leaves = hidden_TM.requires_grad_(), weight_VM.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss, cross_entropy_T, _ = token_loss(*leaves, targets_T, shares_T)
    expected_loss, expected_T = naive_loss(*exact, targets_T, shares_T.double())
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cross_entropy_T.double(), expected_T, rtol=1e-6, atol=1e-5)
    # A factor behind the loss reaches both gradients.
    (3 * loss).backward()
    (3 * expected_loss).backward()
    for leaf, twin in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-6 * scale)


def test_mean_and_single_tokens_have_gradients_too() -> None:
    hidden_TM, weight_VM, targets_T, shares_T = drawn()
    leaves = hidden_TM.requires_grad_(), weight_VM.requires_grad_()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss, cross_entropy_T, _ = token_loss(*leaves, targets_T)
    _, expected_T = naive_loss(*exact, targets_T, shares_T.double())
    torch.testing.assert_close(loss.double(), expected_T.mean(), rtol=1e-6, atol=1e-6)
    (2 * loss + (cross_entropy_T * shares_T).sum()).backward()
    (2 * expected_T.mean() + (expected_T * shares_T).sum()).backward()
    for leaf, twin in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        torch.testing.assert_close(leaf.grad.double(), twin.grad, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_values_are_the_same() -> None:
    hidden_TM, weight_VM, targets_T, shares_T = drawn()
    with_gradients = token_loss(hidden_TM.requires_grad_(), weight_VM.requires_grad_(), targets_T, shares_T)
    with torch.no_grad():
        without = token_loss(hidden_TM, weight_VM, targets_T, shares_T)
    assert not without[0].requires_grad and with_gradients[0].requires_grad
    for value, other in zip(without, with_gradients, strict=True):
        torch.testing.assert_close(value, other.detach(), rtol=0, atol=0)


def test_gradients_in_bfloat16_are_added_up_in_float32() -> None:
    hidden_TM, weight_VM, targets_T, shares_T = drawn()
    leaves = [part.bfloat16().requires_grad_() for part in (hidden_TM, weight_VM)]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss, *_ = token_loss(*leaves, targets_T, shares_T)
    loss.backward()
    naive_loss(*exact, targets_T, shares_T.double())[0].backward()
    assert loss.dtype == torch.float32
    for leaf, twin in zip(leaves, exact, strict=True):
        assert leaf.grad is not None and twin.grad is not None
        error = torch.linalg.vector_norm(leaf.grad.double() - twin.grad) / torch.linalg.vector_norm(twin.grad)
        # Logits, softmax and result are rounded to 8 bits each.
        assert float(error) < 3 * 2**-8


def test_a_hidden_state_that_is_not_finite_shows_in_the_loss() -> None:
    hidden_TM, weight_VM, targets_T, _ = drawn()
    hidden_TM[7, 3] = math.inf
    loss, cross_entropy_T, _ = token_loss(hidden_TM, weight_VM, targets_T, torch.ones(T) / T)
    assert not bool(loss.isfinite())
    assert torch.nonzero(~cross_entropy_T.isfinite()).flatten().tolist() == [7]
