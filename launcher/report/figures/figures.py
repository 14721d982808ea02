"""The figures of a report, saved as SVG (for papers and for the lines on the page) and PNG.

Colours are those of Okabe and Ito and of viridis, which colour-blind readers can tell apart; runs differ in line and
marker too. The reference is black and the control grey everywhere. The same numbers give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_testbed.launcher.report.figures.canvas import Look
from moe_testbed.launcher.report.figures.drawing import Job, Picture, draw
from moe_testbed.launcher.report.figures.heatmaps import draw_causes, draw_loss_differences, draw_routing
from moe_testbed.launcher.report.figures.lines import (
    draw_panels,
    kept_panels,
    layer_panels,
    loss_panel,
    training_panels,
)
from moe_testbed.launcher.report.figures.scatter import Point, draw_scatter
from moe_testbed.launcher.report.figures.stages import copied_over_steps, draw_ledger, loss_over_flops
from moe_testbed.launcher.report.numbers.results import ranked
from moe_testbed.launcher.report.read.records import Suite, Training
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
    stacks = _by_stack(runs)
    for stack, of_stack in {"": runs, **stacks}.items():
        if panels := training_panels(of_stack):
            yield Job(
                _named("training", stack),
                "training",
                _titled("Routing over training", stack),
                "Mean over layers and seeds; the band is the range of the seeds. Information and load are those of "
                "each step's training batch. Saturation is the share of a token's final experts that it already has, "
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
        training = next(training for training in suite.of(run["label"]) if training.evaluation is not None)
        assert training.evaluation is not None, "this was asked for"
        if len(training.evaluation.counts_top_k_YDE):
            yield _routing(training, training.evaluation)
    for part, section, title, caption in _PROFILES:
        for stack, of_stack in {"": [run for run in runs if "stacks" not in run], **stacks}.items():
            if panels := layer_panels(of_stack, part):
                yield Job(
                    _named(section if section == "layers" else f"{section}_layers", stack),
                    section,
                    _titled(title, stack),
                    f"{caption} Layers are counted among the MoE layers{f' of the {stack}' if stack else ''}.",
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


def _by_stack(runs: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Name of each stack -> what the runs that have it say of it; of a causal model nothing."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        for stack, of_stack in run.get("stacks", {}).items():
            found.setdefault(stack, []).append({**of_stack, "label": run["label"]})
    return found


def _named(name: str, stack: str) -> str:
    return f"{name}_{stack}" if stack else name


def _titled(title: str, stack: str) -> str:
    return f"{title}: {stack}" if stack else title


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
    if panels := kept_panels(results["runs"]):
        yield Job(
            "routing_kept",
            "stages",
            "What remains of the encoder's routing",
            "Of a run that starts from an encoder, the share of first choices, and of all choices, in the encoder that "
            "are those of before its first step, on a fixed probe. Mean over the encoder's layers and over seeds; the "
            "band is the range of the seeds.",
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


def _routing(training: Training, evaluation: Evaluation) -> Job:
    counts_YDE, domains, layers = evaluation.counts_top_k_YDE, evaluation.domains, training.layers
    num_layers = len(counts_YDE)
    every, shown, which = list(range(num_layers)), [0, num_layers // 2, num_layers - 1], "First, middle and last"
    if len(layers.by_stack) > 1:
        ends = {end for numbers in layers.by_stack.values() for end in (numbers[0], numbers[-1])}
        shown, which = sorted(ends), "First and last layer of each stack"
    caption, whole = f"Seed {training.seed}, top-k choices.", None
    if num_layers <= SHOWN_LAYERS:
        shown = every
    else:
        caption += f" {which} of {num_layers} MoE layers; all of them are in figures/."
        whole = counts_YDE, domains, every, 4, layers.names
    name = f"routing_{training.label}"
    arguments = counts_YDE, domains, shown, 1, layers.names
    return Job(name, "routing", training.label, caption, draw_routing, arguments, heat_map=True, whole=whole)


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
