"""The figures of a report, saved as SVG (for papers and for the lines on the page) and PNG.

Colours are those of Okabe and Ito and of viridis, which colour-blind readers can tell apart; runs differ in line and
marker too. The reference is black and the control grey everywhere. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_testbed.launcher.report.figures.canvas import Look
from moe_testbed.launcher.report.figures.drawing import Job, Picture, draw
from moe_testbed.launcher.report.figures.heatmaps import draw_causes, draw_loss_differences, draw_routing
from moe_testbed.launcher.report.figures.lines import draw_panels, layer_panels, loss_panel, training_panels
from moe_testbed.launcher.report.figures.scatter import Point, draw_scatter
from moe_testbed.launcher.report.figures.stages import copied_over_steps, draw_ledger, loss_over_flops
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.read.records import Suite
from moe_testbed.launcher.report.two_processes import in_two
from moe_testbed.launcher.run.arrays import Evaluation
from moe_testbed.launcher.run.files import write_bytes_atomically

__all__ = ["COLOURS", "Picture", "draw_all", "save"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP<>"
LINES = ("-", "--", ":", "-.")
SHOWN_LAYERS = 4
"""Where a model has more MoE layers, the page shows the first, the middle and the last."""


def draw_all(suite: Suite, results: dict[str, Any]) -> list[Picture]:
    """Every figure that the suite has the numbers for."""
    return in_two(draw, list(_jobs(suite, results)))


def save(pictures: list[Picture], folder: Path) -> None:
    """Writes each figure as NAME.svg and NAME.png; all layers, where it shows some, as NAME_all_layers."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_bytes_atomically(folder / f"{picture.name}.svg", picture.svg)
        write_bytes_atomically(folder / f"{picture.name}.png", picture.png)
        if picture.whole is not None:
            write_bytes_atomically(folder / f"{picture.name}_all_layers.svg", picture.whole[0])
            write_bytes_atomically(folder / f"{picture.name}_all_layers.png", picture.whole[1])


def _jobs(suite: Suite, results: dict[str, Any]) -> Iterator[Job]:
    runs = [run for run in ranked(results) if run["loss"]["mean"] is not None]
    yield from _of_losses(suite, results, runs)
    looks = _looks(results)
    yield from _of_stages(suite, results, looks)
    if panels := training_panels(runs):
        yield Job(
            "training",
            "training",
            "Routing over training",
            "Mean over layers and seeds; the band is the range of the seeds. Information and load are those of each "
            "step's training batch. Saturation is the share of a token's final experts that it already has, "
            "fluctuation the share of tokens whose first choice changed since the point before, on a fixed probe.",
            draw_panels,
            (panels, looks, "optimizer steps", 1.5),
        )
    best = results["reference"]["best"]
    if best is not None and len(runs) > 1:
        losses = {
            run["label"]: [run["loss_by_domain"][domain]["mean"] for domain in results["domains"]] for run in runs
        }
        yield Job(
            "loss_by_domain",
            "domains",
            "Loss by domain, difference to the reference",
            f"Nats per token above (orange) or below (purple) {best}.",
            draw_loss_differences,
            (losses, best, results["domains"]),
            heat_map=True,
        )
    for run in runs:
        seed, evaluation = next(iter(suite.evaluations(run["label"]).items()))
        if len(evaluation.counts_top_k_YDE):
            yield _routing(run["label"], seed, evaluation)
    for part, section, title, caption in _PROFILES:
        if panels := layer_panels(runs, part):
            yield Job(
                section if section == "layers" else f"{section}_layers",
                section,
                title,
                f"{caption} Layers are counted among the MoE layers.",
                draw_panels,
                (panels, looks, "MoE layer"),
            )
    for run in runs:
        causes = run["causes"]
        if causes is not None and (causes["forced_matrix"] or causes["ablation_matrix"]):
            yield Job(
                f"causal_{run['label']}",
                "causal",
                run["label"],
                f"Change of loss by domain (rows), {causes['sequences']} sequences, mean over seeds: orange is worse.",
                draw_causes,
                (causes["forced_matrix"], causes["ablation_matrix"], results["domains"]),
                heat_map=True,
            )


_PROFILES = (
    ("routing", "layers", "Layer by layer", "Top-k choices, mean over seeds."),
    ("router_measures", "router", "Router, layer by layer", "Mean over seeds, of the routers that have scores."),
    ("causes", "causal", "Causes, layer by layer", "Mean over seeds."),
    ("redundancy", "redundancy", "Redundancy, layer by layer", "Means over the pairs of experts and over seeds."),
)


_OF_TRAINING = " Smoothed over a fiftieth of the run; a wedge marks a loss spike of a seed."


def _of_losses(suite: Suite, results: dict[str, Any], runs: list[dict[str, Any]]) -> Iterator[Job]:
    """The overview, and the losses by step."""
    routed = [run for run in runs if None not in _place(run)]
    if routed:
        points = [Point(run["label"], run["role"], *_place(run), run["loss"]["mean"]) for run in routed]
        yield Job(
            "scatter",
            "overview",
            "Specialization, utilization, loss",
            "Top-k choices, mean over layers and seeds. The corner at the top right is where every expert is used and "
            "gives its domain away. Darker is a lower loss; a star marks the reference, a cross the control.",
            draw_scatter,
            (points, results["split"]),
        )
    for kind, title in (("evaluation", f"{results['split'].capitalize()} loss"), ("train", "Training loss")):
        panel = loss_panel(suite, runs, kind)
        if panel.lines:
            yield Job(
                f"loss_{kind}",
                "curves",
                title,
                "Mean over seeds; the band is the range of the seeds. The axis is cut to the losses after the first "
                f"third of the steps.{_OF_TRAINING if kind == 'train' else ''}",
                draw_panels,
                ([panel], _looks(results), "optimizer steps", 3.8),
            )


def _of_stages(suite: Suite, results: dict[str, Any], looks: dict[str, Look]) -> Iterator[Job]:
    """What trainings in stages take, and what they come to for it."""
    staged = results.get("stages")
    if staged is None:
        return
    if panels := loss_over_flops(suite, staged):
        yield Job(
            "loss_over_flops",
            "stages",
            "Loss over FLOPs, inherited ones included",
            "Mean over seeds; the band is the range of the seeds. One panel for each task.",
            draw_panels,
            (panels, looks, "10^12 FLOPs", 2.6),
        )
    if panels := copied_over_steps(suite, staged):
        yield Job(
            "copying",
            "stages",
            "When copying emerges",
            "Loss in nats per token at tokens that the encoder reads, and at those that are missing in its text.",
            draw_panels,
            (panels, looks, "optimizer steps", 1.75),
        )
    ledgers = {label: ledger for label, ledger in staged["ledger"].items() if ledger is not None}
    if ledgers:
        title = "What each training has taken"
        yield Job("ledger", "stages", title, "Mean over seeds.", draw_ledger, (ledgers,))


def _place(run: dict[str, Any]) -> tuple[Any, Any]:
    """The place of a run in the overview."""
    top_k = run["routing"]["top_k"]
    return top_k["domain_information"]["mean"], top_k["normalised_effective_experts"]["mean"]


def _routing(label: str, seed: int, evaluation: Evaluation) -> Job:
    counts_YDE, domains = evaluation.counts_top_k_YDE, evaluation.domains
    num_layers = len(counts_YDE)
    every, shown = list(range(num_layers)), [0, num_layers // 2, num_layers - 1]
    caption, whole = f"Seed {seed}, top-k choices.", None
    if num_layers <= SHOWN_LAYERS:
        shown = every
    else:
        caption += f" First, middle and last of {num_layers} MoE layers; all of them are in figures/."
        whole = counts_YDE, domains, every, 4
    name = f"routing_{label}"
    arguments = counts_YDE, domains, shown
    return Job(name, "routing", label, caption, draw_routing, arguments, heat_map=True, whole=whole)


def _looks(results: dict[str, Any]) -> dict[str, Look]:
    """The look of every run, by its place in the suite, so that a run that fails repaints no other."""
    looks, others, references = {}, 0, 0
    for run in results["runs"]:
        if run["role"] == "reference":
            looks[run["label"]] = Look("#000000", LINES[references % len(LINES)], "*", 2.6)
            references += 1
        elif run["role"] == "control":
            looks[run["label"]] = Look("#7b8794", "--", "X", 2.2)
        else:
            colour, line = others % len(COLOURS), others // len(COLOURS)
            marker = MARKERS[(colour + line // len(LINES)) % len(MARKERS)]
            looks[run["label"]] = Look(COLOURS[colour], LINES[line % len(LINES)], marker)
            others += 1
    return looks
