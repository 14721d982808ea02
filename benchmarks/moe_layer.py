"""How long does an MoE layer take, forward and backward, beside a dense feed-forward layer of equal active FLOPs?

    python benchmarks/moe_layer.py [--tokens 4096] [--experts 64] [--top-k 2] [--hidden-size 128]
                                   [--expert-hidden-size 64] [--rounds 15]

One thread, float32, processor time. Router, dispatch, experts and combination are all inside the measured time. The
peers run in turn, round after round, so that what else the machine does falls on all of them; the ratio is the median
over the rounds of (layer / dense), both from the same round. Gradients start from None, as after an optimizer step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from torch import Tensor, nn

from moe_testbed.launcher.train.allocator import keep_freed_memory
from moe_testbed.model.config import MoEConfig
from moe_testbed.model.deepspeed_moe import MoE, RoutedMoE
from moe_testbed.model.moe import MoEOutput
from moe_testbed.model.transformer import FeedForward
from moe_testbed.routing.records import RouterSetting, RoutingContext
from moe_testbed.routing.routers.top_k import TopK, TopKConfig

_DEEPSPEED = "DeepSpeed's layer"


class Routed(nn.Module):
    """Our layer with a top-k router, without a balancing loss."""

    def __init__(self, arguments: argparse.Namespace, dispatch: str) -> None:
        super().__init__()
        experts, top_k, width = arguments.experts, arguments.top_k, arguments.hidden_size
        config = {"num_experts": experts, "top_k": top_k, "expert_hidden_size": arguments.expert_hidden_size}
        self.moe = RoutedMoE(width, MoEConfig.model_validate(config | {"dispatch": dispatch, "capacity_factor": 2.0}))
        setting = RouterSetting(experts, top_k, width, 0, 0, ("all",), (1.0,), torch.ones(1, 2, dtype=torch.int64))
        self.router = TopK(TopKConfig(), setting)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5)
        zeros_1T = torch.zeros(1, arguments.tokens, dtype=torch.int64)
        self.context = RoutingContext(zeros_1T, zeros_1T, zeros_1T, zeros_1T, zeros_1T[:, 0])

    def forward(self, x_TM: Tensor) -> Tensor:
        output: MoEOutput = self.moe(x_TM[None], self.router(x_TM, self.context))
        return output.hidden_BLM[0]


class Stock(nn.Module):
    """DeepSpeed's own layer and gate, told to drop nothing; the gate computes its balancing loss."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        super().__init__()
        expert = FeedForward(arguments.hidden_size, arguments.expert_hidden_size)
        self.moe = MoE(arguments.hidden_size, expert, arguments.experts, k=arguments.top_k, drop_tokens=False)

    def forward(self, x_TM: Tensor) -> Tensor:
        output_1TM, _, _ = self.moe(x_TM[None])
        return output_1TM[0]


def main() -> None:
    """Prints a table of medians and ratios."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in (
        ("tokens", 4096),
        ("experts", 64),
        ("top-k", 2),
        ("hidden-size", 128),
        ("expert-hidden-size", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_TM = torch.randn(arguments.tokens, arguments.hidden_size, requires_grad=True)
    gradient = torch.randn(arguments.tokens, arguments.hidden_size)
    layers = {
        "dense": FeedForward(arguments.hidden_size, arguments.top_k * arguments.expert_hidden_size),
        "dropless": Routed(arguments, "dropless"),
        "capacity (factor 2)": Routed(arguments, "capacity"),
        _DEEPSPEED: Stock(arguments),
    }
    parameters = {name: list(layer.parameters()) for name, layer in layers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(arguments.rounds + 2):
        for name, layer in layers.items():
            for parameter in (x_TM, *parameters[name]):
                parameter.grad = None
            started = time.process_time()
            layer(x_TM).backward(gradient)
            seconds[name].append(time.process_time() - started)
    print(
        f"{arguments.tokens} tokens, E = {arguments.experts}, k = {arguments.top_k}, d = {arguments.hidden_size}, "
        f"h = {arguments.expert_hidden_size}, float32, one thread, forward and backward, {arguments.rounds} rounds"
    )
    dense = seconds["dense"][2:]
    ratios = {}
    for name, times in seconds.items():
        ratios[name] = statistics.median(own / base for own, base in zip(times[2:], dense, strict=True))
        print(f"{name:22} {1000 * statistics.median(times[2:]):7.1f} ms   {ratios[name]:5.2f} x dense")
    said = f"{ratios['dropless']:.1f} x (DeepSpeed's own layer: {ratios[_DEEPSPEED]:.1f} x)"
    print(json.dumps({"figures": {"moe_layer": said}}))


if __name__ == "__main__":
    main()
