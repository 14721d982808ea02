"""How long do the output layer and its loss take, forward and backward, beside torch's own ways?

    python benchmarks/output_layer.py [--tokens 4096] [--hidden-size 64] [--vocab-size 2048] [--rounds 15]

One thread, float32, processor time. The ways run in turn, round after round; a ratio is the median over the rounds of
(way / two calls), both from the same round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_testbed.launcher.train.allocator import keep_freed_memory
from moe_testbed.model.output_layer import token_loss

_TWO_CALLS, _CHUNKED, _OURS = "linear and cross_entropy", "linear_cross_entropy, chunked", "token_loss"


def main() -> None:
    """Prints a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (("tokens", 4096), ("hidden-size", 64), ("vocab-size", 2048), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_TM = torch.randn(arguments.tokens, arguments.hidden_size, requires_grad=True)
    weight_VM = (torch.randn(arguments.vocab_size, arguments.hidden_size) / arguments.hidden_size**0.5).requires_grad_()
    targets_T = torch.randint(0, arguments.vocab_size, (arguments.tokens,))

    def two_calls() -> Tensor:
        return F.cross_entropy(F.linear(hidden_TM, weight_VM), targets_T, reduction="none").mean()

    def chunked() -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden_TM, weight_VM, targets_T, options=options)

    def ours() -> Tensor:
        return token_loss(hidden_TM, weight_VM, targets_T)[0]

    ways: dict[str, Callable[[], Tensor]] = {_TWO_CALLS: two_calls, _CHUNKED: chunked, _OURS: ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds + 2):
        for name, way in ways.items():
            hidden_TM.grad = weight_VM.grad = None
            started = time.process_time()
            way().backward()
            seconds[name].append(time.process_time() - started)
    print(
        f"{arguments.tokens} tokens, d = {arguments.hidden_size}, {arguments.vocab_size} token ids, float32, "
        f"one thread, forward and backward, {arguments.rounds} rounds"
    )
    ratios = {}
    for name, times in seconds.items():
        pairs = zip(times[2:], seconds[_TWO_CALLS][2:], strict=True)
        ratios[name] = statistics.median(own / base for own, base in pairs)
        print(f"{name:30} {1000 * statistics.median(times[2:]):7.1f} ms   {ratios[name]:5.2f} x")
    said = f"{ratios[_OURS]:.2f} x (torch's chunked linear_cross_entropy: {ratios[_CHUNKED]:.2f} x)"
    print(json.dumps({"figures": {"output_layer": said}}))


if __name__ == "__main__":
    main()
