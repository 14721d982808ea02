"""Fine-tuning: a short training of everything, at the learning rate that is best on a part of the training text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from moe_testbed.data.probes.config import Learning
from moe_testbed.launcher.errors import CheckpointError
from moe_testbed.routing.errors import RouterError

Item = TypeVar("Item")

DEVELOPMENT = 0.15
"""The share of the training documents on which the rate is chosen."""
_WARMUP = 0.1
_DECAY = 0.01
_NORM = 1.0


def fine_tune(
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[list[Item]], Tensor],
    items: Sequence[Item],
    learning: Learning,
    rate: float,
    seed: int,
) -> bool:
    """Trains parameters with AdamW: linear warm-up over a tenth of the steps, then linearly down to nothing.

    Args:
        loss_of: the mean loss of a batch, scalar.
        items: what is learned from, each once an epoch, in an order that the seed decides.

    Returns:
        Whether all losses were finite; if not, the training has ended there.

    Raises:
        RouterError: what a router returns is no decision, already before the first update.
    """
    rng = np.random.default_rng(seed)
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=_DECAY)
    a_epoch = math.ceil(len(items) / learning.batch_size)
    steps = learning.epochs * a_epoch
    warmup = max(1, round(_WARMUP * steps))
    for step in range(steps):
        if step % a_epoch == 0:
            order = rng.permutation(len(items))
        begin = step % a_epoch * learning.batch_size
        try:
            loss = loss_of([items[number] for number in order[begin : begin + learning.batch_size]])
        except RouterError:
            # Weights that are not finite meet a router before the loss.
            if step == 0:
                raise
            return False
        if not bool(loss.isfinite()):
            return False
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, _NORM)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))
        optimizer.step()
    return True


def best_rate(name: str, learning: Learning, quality: Callable[[float], float]) -> float:
    """Returns the learning rate of the best quality; the first of equals.

    Args:
        name: of what is trained, for messages.
        quality: what a training at a rate comes to on the development part; nan where it has diverged.

    Raises:
        CheckpointError: it diverges at all rates.
    """
    if len(learning.rates) == 1:
        return learning.rates[0]
    found = {rate: quality(rate) for rate in learning.rates}
    finite = {rate: value for rate, value in found.items() if math.isfinite(value)}
    if not finite:
        raise diverged(name, learning.rates)
    return max(finite, key=lambda rate: finite[rate])


def diverged(name: str, rates: Sequence[float]) -> CheckpointError:
    """Returns what is raised where a fine-tuning has no finite loss."""
    return CheckpointError(
        f"fine-tuning {name} diverges at the learning rate {', '.join(f'{rate:g}' for rate in rates)}; give lower "
        "ones, such as learning.rates=[1e-4]"
    )
