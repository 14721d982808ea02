"""Heat maps: losses by run and domain, assignments by domain and expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from moe_testbed.routing.metrics import conditional, owners


def draw_loss_differences(runs: list[dict[str, Any]], best: str, domains: Sequence[str], width: float) -> Figure:
    """Runs x domains: the loss less the best reference's. `runs` are those with a loss, the reference among them."""
    by_label = {run["label"]: _losses(run, domains) for run in runs}
    others = [label for label in by_label if label != best]
    difference = np.array([by_label[label] - by_label[best] for label in others])
    bound = max(float(np.nanmax(np.abs(difference))), 1e-3)
    figure = Figure(figsize=(width, 1.9 + 0.36 * len(others)))
    axes = figure.add_subplot()
    axes.grid(False)
    image = axes.imshow(difference, cmap="PuOr_r", vmin=-bound, vmax=bound, aspect="auto")
    axes.set_xticks(range(len(domains)), domains, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(others)), others)
    axes.tick_params(length=0)
    if len(domains) <= 16:
        for (row, column), value in np.ndenumerate(difference):
            colour = "white" if abs(value) > 0.65 * bound else "black"
            text = f"{value:+.2f}".replace("-", "−")
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9 if len(domains) <= 8 else 7)
    figure.colorbar(image, label="nats per token", pad=0.02, shrink=0.95)
    return figure


def draw_routing(counts_YDE: NDArray[np.int64], domains: Sequence[str], width: float) -> Figure:
    """Domains x experts, one map per layer, experts sorted by owner; colours end at the share D/E.

    D/E is each expert's share of its domain where experts are divided evenly among domains and used by them alone.
    """
    num_layers, num_domains, num_experts = counts_YDE.shape
    figure = Figure(figsize=(width, num_layers * (0.75 + 0.23 * num_domains) + 0.4))
    all_axes = figure.subplots(num_layers, 1, squeeze=False)[:, 0]
    colours = ScalarMappable(Normalize(0, min(1.0, num_domains / num_experts)), "viridis")
    for layer, (axes, counts_DE) in enumerate(zip(all_axes, counts_YDE, strict=True)):
        owner_E, order_E = owners(counts_DE)
        axes.grid(False)
        axes.imshow(
            conditional(counts_DE)[:, order_E],
            cmap=colours.cmap,
            norm=colours.norm,
            aspect="auto",
            interpolation="nearest",
        )
        for border in np.flatnonzero(np.diff(owner_E[order_E])):
            axes.axvline(border + 0.5, color="white", linewidth=0.8)
        axes.set_yticks(range(num_domains), domains)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.set_title(f"MoE layer {layer}", loc="left")
    all_axes[-1].set_xlabel(f"{num_experts} experts, by the domain that they serve most")
    figure.colorbar(colours, ax=list(all_axes), label="share of the domain's assignments", extend="max", pad=0.02)
    return figure


def _losses(run: dict[str, Any], domains: Sequence[str]) -> NDArray[np.float64]:
    means = [run["loss_by_domain"][domain]["mean"] for domain in domains]
    return np.array([np.nan if mean is None else mean for mean in means])
