"""results.csv: every number of results.json in a row of its own, for spreadsheets and data frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_testbed.launcher.report.numbers.values import Results
from moe_testbed.launcher.run.files import csv_text

COLUMNS = (
    "run", "role", "router", "quantity", "form", "moe_layer", "domain",
    "mean", "spread", "low", "high", "over", "seeds",
)  # fmt: skip
NOT_A_NUMBER = ("label", "description", "role", "router", "causal", "trainings", "moe_layers", "stacks")
"""Parts of a run that have no rows of their own."""
MEAN = "mean"
CURVES = "over_training"
"""A part that is lists of steps, and has no rows."""


def results_csv(results: Results) -> str:
    """Returns the whole file. `form` is top_1, top_k or top_k_kept, or the part of the results that a quantity belongs
    to. `moe_layer` is the layer, `mean` for the mean over all of them, or `mean of encoder` for that over the layers of
    a stack."""
    return csv_text(
        COLUMNS,
        ((run["label"], run["role"], run["router"], *row) for run in results["runs"] for row in _of_run(run)),
    )


def _of_run(run: Results) -> Iterator[tuple[Any, ...]]:
    names = dict(enumerate(run.get("moe_layers", ())))
    for name, part in run.items():
        if name not in NOT_A_NUMBER:
            for quantity, form, layer, *rest in _rows(name, part, ""):
                yield quantity, form, names.get(layer, layer), *rest
    for stack, of_stack in run.get("stacks", {}).items():
        for name, part in of_stack.items():
            for quantity, form, layer, *rest in _rows(name, part, ""):
                if layer == MEAN:
                    yield quantity, form, f"{MEAN} of {stack}", *rest


def _rows(name: str, part: Any, form: str) -> Iterator[tuple[Any, ...]]:
    """The rows of one number, or of all the numbers within a part; what is no number or was not recorded has none."""
    if not isinstance(part, dict) or name == CURVES:
        return
    if "mean" in part or "undefined" in part:
        yield from _number(name, part, form, "")
    elif name.endswith("_by_domain"):
        for domain, number in part.items():
            yield from _number(name.removesuffix("_by_domain"), number, form, domain)
    else:
        for key, inner in part.items():
            yield from _rows(key, inner, name)


def _number(name: str, number: Results, form: str, domain: str) -> Iterator[tuple[Any, ...]]:
    """A row for the number, and one for each layer, if it has layers."""
    has_layers = "layers" in number
    yield _row(name, number, form, MEAN if has_layers else "", domain)
    for layer, of_layer in enumerate(number.get("layers", ())):
        yield _row(name, of_layer, form, layer, domain)


def _row(name: str, number: Results, form: str, layer: object, domain: str) -> tuple[Any, ...]:
    mean = number["value"] if "value" in number else number["mean"]
    return (name, form, layer, domain, mean, *(number.get(key) for key in ("spread", "low", "high", "over", "seeds")))
