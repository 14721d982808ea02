"""Does a GPU compute what the CPU does, and how fast?

    python benchmarks/gpu_check.py                # on a machine with a CUDA GPU; or make gpu-check
    python benchmarks/gpu_check.py --rehearse     # everything on the CPU in small sizes, to try this script

1. The losses of 50 steps of `tiny.yaml` beside the CPU's, and one forward and backward pass of each router and each way
   of dispatch. 2. In bfloat16, a forward and backward pass of `small` and of one wide MoE layer: the share of what the
   device reaches in one large matrix product, the time beside a dense layer or model of equal active FLOPs, and how
   often the host waits for the device. 3. The most memory of such a pass beside the plan's. 4. All of it as one table.

It needs no network: its texts are this repository's own files. It needs DeepSpeed, but none of its compiled operators.
The exit status is 1 if a loss differs by more than is allowed, and 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from earlier_commit import PACKAGES, lay_out
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs/experiments/tiny.yaml"
# A loss is a mean over thousands of tokens; later in a training one choice that turns by rounding moves it further.
FIRST_STEPS, FIRST_TOLERANCE, TOLERANCE = 10, 1e-5, 1e-2
PASS_TOLERANCE = 1e-4


class Check:
    """What is measured, on which device, and the table's rows so far."""

    def __init__(self, folder: Path, rehearse: bool) -> None:
        self.folder, self.rehearse = folder, rehearse
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.rows: list[tuple[str, str]] = []
        self.faults: list[str] = []
        self.mix = folder / "mix.yaml"
        code = [
            {"kind": "files", "glob": str(ROOT / package / "**/*.py")} for package in PACKAGES if package != "configs"
        ]
        pages = [{"kind": "files", "glob": str(ROOT / "docs/*.md")}]
        domains = {"python": {"sources": code}, "english": {"sources": pages}}
        fractions = {"validation_fraction": 0.2, "tuning_fraction": 0.2}
        mix = {"name": "own_files", "vocab_size": 2048, "domains": domains, **fractions}
        self.mix.write_text(yaml.safe_dump(mix), encoding="utf-8")

    def say(self, question: str, answer: str) -> None:
        """Adds a row."""
        self.rows.append((question, answer))
        print(f"{question}: {answer}", flush=True)

    def expect(self, within: bool, what: str) -> None:
        """Notes a fault unless it is within what is allowed."""
        if not within:
            self.faults.append(what)
            print(f"FAULT: {what}", flush=True)

    @property
    def short(self) -> list[str]:
        """Overrides of tiny.yaml: this repository's files, and nothing that is not a step."""
        short = ["evaluation.every=0", "evaluation.sequences_per_domain=1", "ablation.sequences_per_domain=0"]
        short += ["probe.points=0", "tracking.mlflow=false", "checkpoint.every=0", f"data.mix={self.mix}"]
        return [*short, f"data.cache_dir={self.folder / 'cache'}"]

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """Returns the median time of one call, after two that are not counted."""
        times = []
        for _ in range(repeats + 2):
            self.synchronise()
            started = time.perf_counter()
            work()
            self.synchronise()
            times.append(time.perf_counter() - started)
        return statistics.median(times[2:])

    def synchronise(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def waits(self, work: Callable[[], Any]) -> int:
        """Returns how often the host waits for the device in one call; 0 on a CPU, which is no other device."""
        if self.device.type != "cuda":
            return 0
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            work()
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


def check_training(check: Check) -> None:
    """Trains tiny.yaml on the CPU and on the device and compares the losses."""
    losses: dict[str, list[float]] = {}
    steps = 4 if check.rehearse else 50
    for device in ("cpu", check.device.type):
        run_dir = check.folder / f"run_{len(losses)}_{device}"
        overrides = [f"training.steps={steps}", "training.warmup_steps=2", f"runtime.device={device}"]
        # DeepSpeed keeps the groups of a process for good, so that each training has its own.
        command = [sys.executable, "-m", "moe_testbed.launcher", "train", str(TINY), "--run-dir", str(run_dir)]
        subprocess.run([*command, *check.short, *overrides], check=True)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        losses[device] = [line["loss"] for line in lines if line["kind"] == "train"]
    pairs = zip(losses["cpu"], losses[check.device.type], strict=True)
    off = [abs(own / other - 1) for own, other in pairs]
    check.say(f"losses of {len(off)} steps of tiny.yaml off the CPU's by at most", f"{max(off):.1e}")
    check.say(f"the same of the first {FIRST_STEPS}", f"{max(off[:FIRST_STEPS]):.1e}")
    check.expect(max(off[:FIRST_STEPS]) <= FIRST_TOLERANCE, f"the first losses differ by {max(off[:FIRST_STEPS]):.1e}")
    check.expect(max(off) <= TOLERANCE, f"the losses differ by {max(off):.1e}")


@contextlib.contextmanager
def one_process(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, which DeepSpeed's layers ask for."""
    from moe_testbed.model.deepspeed_moe import create_expert_parallel_groups

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    create_expert_parallel_groups(1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def check_routers(check: Check) -> None:
    """Compares one forward and backward pass of each router and each way of dispatch with the CPU's."""
    from moe_testbed.data.build import build_store
    from moe_testbed.launcher.config.experiment import load_experiment
    from moe_testbed.launcher.ranks.ranks import Ranks
    from moe_testbed.launcher.train.engine import build_model
    from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, build_sampler

    names = sorted(path.stem for path in (ROOT / "configs/routers").glob("*.yaml") if path.stem != "base")
    worst, tried = 0.0, 0
    for name in names:
        for dispatch in ("dropless", "capacity"):
            routing = f"routing={{include: {ROOT / 'configs/routers' / name}.yaml}}"
            options = [*check.short, routing, f"model.moe.dispatch={dispatch}", "training.micro_batch_size=8"]
            config = load_experiment(str(TINY), options)
            store = build_store(config.data.mix, Path(config.data.cache_dir), print)
            results = []
            for device in (torch.device("cpu"), check.device):
                model = build_model(config, store, Ranks(0, 1, device, None))
                context, targets_BL = LANGUAGE_MODELLING(
                    build_sampler(config, store).batch(0, 0, 8), slice(None), 0, device
                ).arguments
                loss = model(context, targets_BL).loss
                loss.backward()
                gradients = [p.grad.norm().cpu() for p in model.parameters() if p.grad is not None]
                results.append(torch.stack([loss.detach().cpu(), torch.stack(gradients).norm()]))
            off = float((results[1] / results[0] - 1).abs().max())
            worst, tried = max(worst, off), tried + 1
            check.expect(off <= PASS_TOLERANCE, f"{name} with {dispatch} dispatch differs by {off:.1e}")
    said = f"{worst:.1e}, {len(names)} routers, {tried} passes"
    check.say("loss and gradient norm of each router, dropless and capacity, off the CPU's by at most", said)


def matrix_peak(check: Check) -> float:
    """Returns the FLOPs per second of a large product in bfloat16."""
    size = 256 if check.rehearse else 8192
    left, right = (torch.randn(size, size, device=check.device, dtype=torch.bfloat16) for _ in range(2))
    peak = 2 * size**3 / check.seconds(lambda: left @ right, 10)
    check.say(f"bfloat16 product of {size} x {size} matrices", f"{peak / 1e12:.1f} TFLOP/s")
    return peak


def check_model(check: Check, peak: float) -> None:
    """Measures `small` in bfloat16 beside its dense baseline, and the most memory beside the plan's."""
    from moe_testbed.launcher.cluster.plan.activations import planned_activations
    from moe_testbed.launcher.config.experiment import load_experiment
    from moe_testbed.launcher.config.model_size import first_setting, language_model, size_of
    from moe_testbed.model.deepspeed_moe import RoutedMoE
    from moe_testbed.routing.records import RoutingContext

    seconds = {}
    for kind, dense in (("small", "false"), ("its dense baseline", "true")):
        options = ["training.micro_batch_size=1", "data.sequence_length=64"] if check.rehearse else []
        options += [f"model.dense_baseline={dense}"]
        config = load_experiment(str(ROOT / "configs/experiments/small.yaml"), options)
        B, L, V = config.training.micro_batch_size, config.data.sequence_length, config.data.mix.vocab_size
        with check.device:
            model = language_model(config, V, first_setting(config), RoutedMoE)
            tokens_BL, zeros_BL = torch.randint(0, V, (B, L + 1)), torch.zeros(B, L, dtype=torch.int64)
            context = RoutingContext(tokens_BL[:, :-1], zeros_BL, zeros_BL, zeros_BL, zeros_BL[:, 0])
        model = model.bfloat16()
        targets_BL = tokens_BL[:, 1:]
        step = passes(model, context, targets_BL)
        seconds[kind] = check.seconds(step, 5)
        share = B * L * size_of(model, L).flops_per_token / seconds[kind] / peak
        said = f"{1000 * seconds[kind]:.1f} ms, {100 * share:.0f} % of that product's speed"
        check.say(f"forward and backward of {kind}, {B} x {L} tokens", said)
        if dense == "false":
            check.say(
                f"times that the host waits for the device in it ({len(model.blocks)} layers)", str(check.waits(step))
            )
            if check.device.type == "cuda":
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                model(context, targets_BL).loss.backward()
                most = torch.cuda.max_memory_allocated() - before
                planned = planned_activations(config, B, 2, "cuda").peak(False)
                said = f"{most / 2**30:.2f} GiB, {planned / 2**30:.2f} GiB planned ({planned / most:.2f} x)"
                check.say("the most memory of its activations", said)
    check.say("small beside its dense baseline", f"{seconds['small'] / seconds['its dense baseline']:.2f} x")


def passes(model: nn.Module, *inputs: Any) -> Callable[[], None]:
    """Returns a forward and a backward pass whose gradients start from None."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(*inputs).loss.backward()

    return run


def check_layer(check: Check, peak: float, top_k: int) -> None:
    """Measures one wide MoE layer in bfloat16 beside a dense one of equal active FLOPs, with its router."""
    from moe_testbed.model.config import MoEConfig
    from moe_testbed.model.deepspeed_moe import RoutedMoE
    from moe_testbed.model.transformer import FeedForward
    from moe_testbed.routing.records import RouterSetting, RoutingContext
    from moe_testbed.routing.routers.top_k import TopK, TopKConfig

    tokens, experts, width, hidden = (512, 8, 64, 128) if check.rehearse else (32_768, 64, 1024, 2816)
    options = {"num_experts": experts, "top_k": top_k, "expert_hidden_size": hidden}
    setting = RouterSetting(experts, top_k, width, 0, 0, ("all",), (1.0,), torch.ones(1, 2, dtype=torch.int64))
    with check.device:
        moe, router = RoutedMoE(width, MoEConfig.model_validate(options)), TopK(TopKConfig(), setting)
        dense = FeedForward(width, top_k * hidden)
        zeros_1T = torch.zeros(1, tokens, dtype=torch.int64)
        x_1TM = torch.randn(1, tokens, width, dtype=torch.bfloat16, requires_grad=True)
        gradient_1TM = torch.randn(1, tokens, width, dtype=torch.bfloat16)
    context = RoutingContext(zeros_1T, zeros_1T, zeros_1T, zeros_1T, zeros_1T[:, 0])
    layers = nn.ModuleList([moe, router, dense]).bfloat16()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=width**-0.5)

    def both_ways(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            layers.zero_grad(set_to_none=True)
            x_1TM.grad = None
            forward().backward(gradient_1TM)

        return run

    routed = both_ways(lambda: moe(x_1TM, router(x_1TM[0], context)).hidden_BLM)
    unrouted = both_ways(lambda: dense(x_1TM))
    own, other = check.seconds(routed, 10), check.seconds(unrouted, 10)
    share = 18 * tokens * top_k * width * hidden / own / peak
    said = f"{1000 * own:.2f} ms, {100 * share:.0f} % of that product's speed, {own / other:.2f} x dense"
    check.say(f"MoE layer, E {experts}, d {width}, h {hidden}, {tokens} tokens, k {top_k}", said)
    check.say(f"times that the host waits for the device in it, k {top_k}", str(check.waits(routed)))


def main() -> int:
    """Prints a table, ready for a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="everything on the CPU, in small sizes")
    arguments = parser.parse_args()
    if not (arguments.rehearse or torch.cuda.is_available()):
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        print(f"gpu-check needs a GPU: torch {torch.__version__}, built for {built}, finds none", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        # The package need not be installed.
        sys.path.insert(0, str(lay_out(ROOT, Path(folder) / "package")))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [sys.path[0], os.environ.get("PYTHONPATH")]))
        check = Check(Path(folder), arguments.rehearse)
        import deepspeed

        device = "CPU, a rehearsal" if arguments.rehearse else torch.cuda.get_device_name()
        check.say("device", f"{device}; torch {torch.__version__}, DeepSpeed {deepspeed.__version__}")
        check_training(check)
        with one_process(check.device):
            check_routers(check)
            peak = matrix_peak(check)
            check_model(check, peak)
            for top_k in (2, 8):
                check_layer(check, peak, top_k)
    print("\n| what | measured |\n| --- | --- |")
    print("\n".join(f"| {question} | {answer} |" for question, answer in check.rows))
    for fault in check.faults:
        print(f"gpu-check: {fault}", file=sys.stderr)
    return int(bool(check.faults))


if __name__ == "__main__":
    sys.exit(main())
