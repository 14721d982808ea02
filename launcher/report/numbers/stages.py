"""Trainings in stages: what each run has taken, and what a second stage saves against training from scratch.

Only runs of the same task, architecture and objective with all its options, have losses that compare.

Shape legend: I seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moe_testbed.launcher.report.numbers.values import Results, stat
from moe_testbed.launcher.report.read.records import Suite, Training
from moe_testbed.launcher.run.records import LedgerRecord

Floats = NDArray[np.float64]
Cost = Callable[[LedgerRecord], float]
InheritedCost = Callable[[LedgerRecord], float | None]

CURRENCIES: Mapping[str, tuple[Cost, InheritedCost]] = {
    "flops": (lambda ledger: ledger.flops, lambda ledger: ledger.inherited_flops),
    "layer_units": (lambda ledger: ledger.layer_units, lambda ledger: ledger.inherited_layer_units),
}
"""Currency -> what a training has taken itself, and what it has inherited, None if that is not known."""

COPIED, COPYING_NATS = "copied", 1.0


def stages(suite: Suite) -> Results | None:
    """What the trainings of a suite have taken and saved; None where all of them are causal models from their seeds."""
    if all(training.task == CAUSAL for training in suite.trainings):
        return None
    return {
        "tasks": {label: task_of(suite, label) for label in suite.descriptions},
        "ledger": {label: _ledger(suite, label) for label in suite.descriptions},
        "kinds": {label: kinds for label in suite.descriptions if (kinds := _kinds(suite, label))},
        "accuracy": {label: _accuracy(suite, label) for label in suite.descriptions},
        "copying_step": {label: step for label in suite.descriptions if (step := _copying_step(suite, label))},
        "saved": list(_saved(suite)),
    }


CAUSAL = "causal, next_token"


def task_of(suite: Suite, label: str) -> str:
    """Returns the task of a run, in words."""
    trainings = suite.of(label)
    return trainings[0].task if trainings else CAUSAL


def _ledger(suite: Suite, label: str) -> Results | None:
    found = [(training, ledger) for training in suite.of(label) if (ledger := _record(training)) is not None]
    if not found:
        return None
    ledgers = [ledger for _, ledger in found]
    parts = list(dict.fromkeys(part for ledger in ledgers for part in ledger.flops_by_part))
    return {
        **{name: stat([float(own(ledger)) for ledger in ledgers]) for name, (own, _) in CURRENCIES.items()},
        **{f"inherited_{name}": _inherited(ledgers, cost) for name, (_, cost) in CURRENCIES.items()},
        "flops_by_part": {part: stat([float(one.flops_by_part.get(part, 0)) for one in ledgers]) for part in parts},
    }


def _inherited(ledgers: Sequence[LedgerRecord], cost: InheritedCost) -> Results | None:
    """What the seeds of a run have inherited; None if that is not known of all of them."""
    known = [float(of_one) for ledger in ledgers if (of_one := cost(ledger)) is not None]
    return stat(known) if len(known) == len(ledgers) else None


def _record(training: Training) -> LedgerRecord | None:
    return LedgerRecord.of(training.summary.ledger) if training.evaluation is not None else None


def _kinds(suite: Suite, label: str) -> Results:
    found: dict[str, list[tuple[float, float]]] = {}
    for evaluation in suite.evaluations(label).values():
        for kind, tokens, loss, correct in evaluation.of_kinds():
            found.setdefault(kind, []).append((loss / tokens, correct / tokens))
    return {
        kind: {"loss": stat([loss for loss, _ in values]), "accuracy": stat([share for _, share in values])}
        for kind, values in found.items()
    }


def _accuracy(suite: Suite, label: str) -> Results:
    shares = [
        float(np.mean(evaluation.correct_D / np.maximum(evaluation.tokens_D, 1)))
        for evaluation in suite.evaluations(label).values()
        if evaluation.correct_D is not None
    ]
    return stat(shares)


def _copying_step(suite: Suite, label: str) -> Results | None:
    """The first evaluated step at which copied tokens have less than one nat, of each seed; null where none has."""
    curves = [t.curve("evaluation", f"{COPIED}/cross_entropy") for t in suite.of(label) if t.evaluation is not None]
    curves = [curve for curve in curves if len(curve)]
    if not curves:
        return None
    below = [curve[curve[:, 1] < COPYING_NATS, 0] for curve in curves]
    return {"steps": [float(steps[0]) if len(steps) else None for steps in below]}


@dataclass(frozen=True)
class Recipe:
    """What second stages have in common that differ in their steps alone."""

    parent: str
    task: str
    tables: str
    words: str


def _saved(suite: Suite) -> Iterator[Results]:
    """The savings of each recipe against the run from scratch with the same task and tables."""
    recipes: dict[Recipe, list[str]] = {}
    scratch: dict[tuple[str, str], str] = {}
    for label in suite.descriptions:
        first = next(iter(suite.of(label)), None)
        if first is None or first.setting("model", "architecture") != "encoder_decoder":
            continue
        tables = str(first.setting("model", "embeddings") or "shared")
        parent = first.setting("start", "encoder", "run")
        if parent is None:
            frozen = first.setting("freeze", "encoder", "until")
            if not frozen:
                scratch.setdefault((first.task, tables), label)
            continue
        recipes.setdefault(Recipe(str(parent), first.task, tables, _recipe_words(first)), []).append(label)
    for recipe, labels in recipes.items():
        other = scratch.get((recipe.task, recipe.tables))
        if other is None or recipe.parent not in suite.descriptions:
            continue
        for currency in CURRENCIES:
            yield {
                "recipe": recipe.words,
                "tables": recipe.tables,
                "encoder": recipe.parent,
                "scratch": other,
                "second_stages": labels,
                "currency": currency,
                "ends": _over_seeds(suite, recipe.parent, other, labels, currency, _ends),
                "mid_run": _over_seeds(suite, recipe.parent, other, labels, currency, _mid_run),
            }


def _recipe_words(training: Training) -> str:
    until = training.setting("freeze", "encoder", "until") or 0
    words = {0: "never frozen", 1: "frozen to the end"}.get(until, f"frozen for {100 * until:g} %")
    take = training.setting("start", "encoder", "take")
    decoder = training.setting("start", "decoder")
    words += "" if take in (None, "all") else f", {take} alone"
    return words + ("" if decoder in (None, "random") else f", decoder {decoder}")


Curve = tuple[Floats, Floats]
"""Costs in rising order, and the loss at each."""


def _ends(trainings: Sequence[Training], currency: str) -> Curve:
    """The final losses of trainings of several lengths, each with a schedule of its own."""
    points = sorted((_own_cost(one, currency), one.evaluation.loss) for one in trainings if one.evaluation)
    return np.array([cost for cost, _ in points]), np.array([loss for _, loss in points])


def _mid_run(trainings: Sequence[Training], currency: str) -> Curve:
    """The losses within the longest training, at the share of its cost that it had taken by then."""
    longest = max(trainings, key=lambda training: training.steps)
    losses, flops = longest.curve("evaluation", "cross_entropy"), longest.curve("train", "flops")
    if not len(losses) or not len(flops):
        return np.zeros(0), np.zeros(0)
    taken = np.interp(losses[:, 0], flops[:, 0], flops[:, 1]) / flops[-1, 1]
    return taken * _own_cost(longest, currency), losses[:, 1]


def _own_cost(training: Training, currency: str) -> float:
    ledger = _record(training)
    return math.nan if ledger is None else float(CURRENCIES[currency][0](ledger))


def _over_seeds(
    suite: Suite,
    parent: str,
    scratch: str,
    labels: Sequence[str],
    currency: str,
    curve_of: Callable[[Sequence[Training], str], Curve],
) -> Results:
    """The saved share, its mean over the seeds and Student's interval at 95 %; and in how many seeds the second stage
    comes to the loss from scratch at all."""
    found: list[Saved] = []
    for seed in suite.seeds:
        of_seed = {t.label: t for t in suite.trainings if t.seed == seed and _record(t) is not None}
        if parent not in of_seed or scratch not in of_seed or not any(label in of_seed for label in labels):
            continue
        target = of_seed[scratch].evaluation
        assert target is not None, "a training with a record has an evaluation"
        costs, losses = curve_of([of_seed[label] for label in labels if label in of_seed], currency)
        stage = cost_at_loss(costs, losses, target.loss)
        found.append(saved(_own_cost(of_seed[parent], currency), _own_cost(of_seed[scratch], currency), stage))
    shares = [one.share for one in found if one.share is not None]
    low, high = students_interval(shares)
    return {
        **stat(shares),
        "low": low,
        "high": high,
        "reached": len(shares),
        "at_least": sum(one.is_bound for one in found),
        "of": len(found),
    }


@dataclass(frozen=True)
class CostAtLoss:
    """What it takes to come to a loss; None if it was not reached. `is_bound`: the cheapest point was below it already,
    so that it takes at most this."""

    cost: float | None
    is_bound: bool = False


@dataclass(frozen=True)
class Saved:
    """A share of two trainings' cost; None if the second stage did not come so far."""

    share: float | None
    is_bound: bool = False


def cost_at_loss(costs: Floats, losses: Floats, target: float) -> CostAtLoss:
    """Returns the cost at which a curve first comes down to a loss, linear in the logarithm of the cost between two
    points; nothing is said beyond the points.

    Args:
        costs: positive, in rising order.
    """
    for number, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
        if not loss <= target:
            continue
        if number == 0:
            return CostAtLoss(float(cost), is_bound=True)
        before_cost, before_loss = costs[number - 1], losses[number - 1]
        share = (before_loss - target) / (before_loss - loss) if before_loss > loss else 0.0
        return CostAtLoss(float(math.exp(math.log(before_cost) + share * (math.log(cost) - math.log(before_cost)))))
    return CostAtLoss(None)


def saved(encoder: float, scratch: float, stage: CostAtLoss) -> Saved:
    """Returns ``(S - S2) / (E + S)``: what both models cost less than two trainings from scratch, as a share of those.

    Args:
        encoder, scratch: E and S, the costs of the encoder and of the seq2seq model from scratch.
        stage: S2, that of the second stage.
    """
    if stage.cost is None:
        return Saved(None)
    return Saved((scratch - stage.cost) / (encoder + scratch), stage.is_bound)


def students_interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns the bounds of the mean at 95 %; none for fewer than two values."""
    if len(values) < 2:
        return None, None
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(np.mean(values)) - half, float(np.mean(values)) + half
