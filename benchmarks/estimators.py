"""How far is the balancing loss's gradient with an estimator of the global batch's load from that with exact counts?

    python benchmarks/estimators.py [EXPERIMENT] [OVERRIDE ...] [--micro-batches 4] [--steps 40]

A model is trained as the experiment says. At every step after the first ten, the gradient of the load-balancing loss
with respect to all routers' weights is computed with each estimator from the same decisions. With d the difference
from the exact gradient g, the columns are

    bias       |mean d| / |mean g|: what is left when steps are averaged
    deviation  sqrt(mean |d - mean d|^2) / |mean g|: what changes from step to step
    cosine     mean of cos(g + d, g)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from moe_testbed.data.build import build_store
from moe_testbed.launcher.config.experiment import load_experiment
from moe_testbed.launcher.ranks.rendezvous import choose_device, join

_WARM = 10
_EXACT = "`global_batch`, `exact`"
SCOPES = {
    _EXACT: {"scope": "global_batch", "estimator": "exact"},
    "`global_batch`, `online`": {"scope": "global_batch", "estimator": "online"},
    "`global_batch`, `previous`": {"scope": "global_batch", "estimator": "previous"},
    "`window` of 4 steps": {"scope": "window", "window_steps": 4},
    "`window` of 16 steps": {"scope": "window", "window_steps": 16},
    "`micro_batch`": {"scope": "micro_batch"},
    "`sequence`": {"scope": "sequence"},
}


def gradients(experiment: str, overrides: list[str], micro_batches: int, steps: int) -> dict[str, Tensor]:
    """Returns the gradient of each scope's loss at every step but the first ones, [steps, routers' weights]."""
    config = load_experiment(experiment, ["tracking.mlflow=false", *overrides])
    torch.set_num_threads(1)
    ranks = join(choose_device("cpu"), timeout_seconds=600.0)
    from moe_testbed.launcher.train.engine import build_model
    from moe_testbed.launcher.train.inputs import LANGUAGE_MODELLING, build_sampler
    from moe_testbed.routing.balance.balancers.load_balancing_loss import LoadBalancingLossConfig
    from moe_testbed.routing.balance.balancing import Balancing

    store = build_store(config.data.mix, Path(config.data.cache_dir), print)
    sampler, model = build_sampler(config, store), build_model(config, store, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.training.learning_rate, betas=config.training.betas)
    moe, layers = config.model.moe, len(model.routers())
    weights = [parameter for router in model.routers() for parameter in router.parameters()]
    balancings = {
        name: Balancing(
            {"even": LoadBalancingLossConfig.model_validate({"coefficient": 1.0, **scope})},
            layers,
            moe.num_routed_experts,
            moe.choices,
        )
        for name, scope in SCOPES.items()
    }
    size = config.training.global_batch_size // micro_batches
    found: dict[str, list[Tensor]] = {name: [] for name in SCOPES}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.training.learning_rate * min(1.0, (step + 1) / max(config.training.warmup_steps, 1))
        outputs = []
        for micro in range(micro_batches):
            batch = sampler.batch(step, micro * size, (micro + 1) * size)
            context, targets_BL = LANGUAGE_MODELLING(batch, slice(None), step, ranks.device).arguments
            outputs.append((context, model(context, targets_BL)))
        decided = [([layer.decision for layer in output.layers], context) for context, output in outputs]
        for name, balancing in balancings.items():
            balancing.begin_step((decisions[:layers], context.valid_T) for decisions, context in decided)
            terms = [balancing(decisions[:layers], context).loss for decisions, context in decided]
            parts = torch.autograd.grad(torch.stack(terms).mean(), weights, retain_graph=True)
            balancing.finish_step()
            if step >= _WARM:
                found[name].append(torch.cat([part.flatten() for part in parts]).double())
        optimizer.zero_grad()
        torch.stack([output.loss for _, output in outputs]).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.training.gradient_clipping or float("inf"))
        optimizer.step()
        model.finish_step()
    return {name: torch.stack(steps_found) for name, steps_found in found.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("experiment", nargs="?", default="configs/experiments/study.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    found = gradients(arguments.experiment, arguments.overrides, arguments.micro_batches, arguments.steps)
    exact = found[_EXACT]
    scale = exact.mean(0).norm()
    print(f"{arguments.steps - _WARM} steps, {arguments.micro_batches} micro-batches\n")
    print(f"{'estimator':<28}{'bias':>8}{'deviation':>11}{'cosine':>8}")
    rows = [["estimator", "bias", "deviation from step to step", "cosine"]]
    deviations = []
    for name, values in found.items():
        difference = values - exact
        bias = difference.mean(0).norm() / scale
        deviation = (difference - difference.mean(0)).square().sum(1).mean().sqrt() / scale
        cosine = torch.cosine_similarity(values, exact, dim=1).mean()
        print(f"{name:<28}{bias:>8.3f}{deviation:>11.3f}{cosine:>8.3f}")
        if values is not exact:
            rows.append([name, f"{bias:.2f}", f"{deviation:.2f}", f"{cosine:.2f}"])
            deviations.append(f"{name} {deviation:.2f}")
    print(json.dumps({"figures": {"estimators": ", ".join(deviations)}, "tables": {"estimators": rows}}))


if __name__ == "__main__":
    main()
