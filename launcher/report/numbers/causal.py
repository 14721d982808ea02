"""The numbers of analysis.npz: what experts cause, and how alike they are.

Intervals are over seeds where there are several, else over the sequences of the sample, drawn within each domain.

Shape legend: Y MoE layers, E experts, D domains, N evaluated sequences of the sample, Z resamples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from moe_testbed.launcher.report.numbers.values import (
    Results,
    in_part,
    layered,
    of_layers,
    over_layers,
    over_layers_of_many,
    part_of,
    stat,
)
from moe_testbed.launcher.run.arrays import Ablation
from moe_testbed.routing import metrics
from moe_testbed.routing.metrics import Interval, Metric
from moe_testbed.routing.metrics.bootstrap import draws, percentile_interval

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 100
"""Resamples of the metrics of damage, whose every resample costs a table of damage."""

DAMAGE = {"ablation_damage_YED": "ablation_loss_YEN", "mean_damage_YED": "mean_loss_YEN"}
"""The tables of damage that metrics are of, and the losses that each is made from."""


def causes(analyses: Sequence[Ablation], domains: Sequence[str]) -> Results | None:
    """Returns what barring, replacing and forcing do to the loss; None without any of it."""
    found: Results = {
        **_of_damage(analyses, "ablation_damage_YED"),
        **_of_damage(analyses, "mean_damage_YED"),
        **_forced(analyses, domains),
        "ablation_matrix": _ablation_matrix(analyses, len(domains)),
    }
    if not any(value is not None for value in found.values()):
        return None
    barred = [a.ablation_loss_YEN for a in analyses if a.ablation_loss_YEN is not None]
    return {
        "sequences": min(len(analysis.baseline_loss_N) for analysis in analyses),
        "experts": int(np.isfinite(barred[0]).any(axis=2).sum()) if barred else 0,
        "experts_in_all": int(barred[0][..., 0].size) if barred else 0,
        **found,
    }


def redundancy(analyses: Sequence[Ablation], widths: Sequence[object] = ()) -> Results | None:
    """How alike experts are: means over the pairs of each layer, and the rank of their stacked outputs.

    widths: model.hidden_size of each training analysed, for `cka_chance`, which is None where one is not known.
    """
    found = part_of("redundancy", analyses)
    if found is None:
        return None
    tokens = [analysis.redundancy_tokens for analysis in analyses if analysis.redundancy_tokens is not None]
    return {**found, "cka_chance": _cka_chance(tokens, widths), "tokens": min(tokens) if tokens else None}


def _cka_chance(tokens: Sequence[int], widths: Sequence[object]) -> Results | None:
    """What the outputs of independent experts have, mean over the trainings."""
    known = [width for width in widths if isinstance(width, int)]
    if not known or not len(known) == len(widths) == len(tokens):
        return None
    return stat([metrics.cka_chance(width, num_tokens) for width, num_tokens in zip(known, tokens, strict=True)])


def _of_damage(analyses: Sequence[Ablation], table: str) -> Results:
    """The metrics of a table of the damage that losing experts does, with their intervals."""
    measures, losses = [metric for metric in in_part("causes") if table in metric.of], DAMAGE[table]
    present = [a for a in analyses if getattr(a, losses) is not None and a.owner_YE is not None]
    if not present:
        return {metric.name: None for metric in measures}
    tables = [_damage(analysis, getattr(analysis, losses)) for analysis in present]
    resampled = _resampled_damage(present[0], getattr(present[0], losses)) if len(present) == 1 else None
    found: Results = {}
    for metric in measures:
        values = [_by_layer(metric, analysis, table, of) for analysis, of in zip(present, tables, strict=True)]
        means = [over_layers(layers) for layers in values]
        bounds = (
            _over_seeds(means)
            if resampled is None
            else _percentiles(means[0], _resampled(metric, present[0], table, resampled))
        )
        found[metric.name] = layered(values, bounds)
    return found


def _resampled(metric: Metric, analysis: Ablation, table: str, damage_ZYED: Floats) -> Sequence[float] | Floats:
    """The mean over layers of a metric in each resample."""
    if metric.of_many is None:
        return [over_layers(_by_layer(metric, analysis, table, damage_YED)) for damage_YED in damage_ZYED]
    by_layer = {name: getattr(analysis, name) for name in metric.of if name != table}
    by_layer[table] = damage_ZYED.swapaxes(0, 1)
    layers = range(len(by_layer[table]))
    values_YZ = [metric.of_many(*(by_layer[name][y] for name in metric.of)) for y in layers]
    return over_layers_of_many(np.stack(values_YZ, axis=1))


def _by_layer(metric: Metric, analysis: Ablation, table: str, damage_YED: Floats) -> list[float]:
    layers = of_layers(metric, analysis, **{table: damage_YED})
    assert layers is not None, f"{metric.name} is of something that analyses lack"
    return layers


def _damage(analysis: Ablation, losses_YEN: Floats) -> Floats:
    """The damage [Y, E, D] that losing each expert does to each domain."""
    return np.stack(
        [
            metrics.damage_matrix(losses_EN, analysis.baseline_loss_N, analysis.sequence_domain_N)
            for losses_EN in losses_YEN
        ]
    )


def _resampled_damage(analysis: Ablation, losses_YEN: Floats) -> Floats:
    """The damage [Z, Y, E, D] in each resample: sequences are drawn with replacement within their domain."""
    rng = np.random.default_rng(0)
    change_YEN = losses_YEN - analysis.baseline_loss_N
    by_domain = [np.flatnonzero(analysis.sequence_domain_N == d) for d in range(len(analysis.domains))]
    weights_ZND = np.zeros((RESAMPLES, len(analysis.baseline_loss_N), len(by_domain)))
    for d, of_domain in enumerate(by_domain):
        if len(of_domain):
            weights_ZND[:, of_domain, d] = draws(rng, len(of_domain), RESAMPLES) / len(of_domain)
    return change_YEN @ weights_ZND[:, None]


def _ablation_matrix(analyses: Sequence[Ablation], num_domains: int) -> list[list[float]] | None:
    """Returns the mean damage, domain x owner, over seeds, layers and the owner's experts; nan where it owns none."""
    by_owner: list[list[Floats]] = [[] for _ in range(num_domains)]
    for analysis in analyses:
        if analysis.ablation_loss_YEN is None or analysis.owner_YE is None:
            continue
        for damage_ED, owner_E in zip(_damage(analysis, analysis.ablation_loss_YEN), analysis.owner_YE, strict=True):
            for owner, damage_D in zip(owner_E, damage_ED, strict=True):
                if owner >= 0 and np.isfinite(damage_D).any():
                    by_owner[owner].append(damage_D)
    if not any(by_owner):
        return None
    columns = [np.mean(rows, axis=0) if rows else np.full(num_domains, np.nan) for rows in by_owner]
    whole: list[list[float]] = np.stack([np.resize(column, num_domains) for column in columns], axis=1).tolist()
    return whole


def _forced(analyses: Sequence[Ablation], domains: Sequence[str]) -> Results:
    """The price of keeping to one's own group, that of another's, and the whole matrix."""
    present = [analysis for analysis in analyses if analysis.forced_loss_DN is not None]
    if not present:
        return dict.fromkeys(("keep_only_group", "keep_only_group_by_domain", "forced_elsewhere", "forced_matrix"))
    matrices = np.stack(
        [metrics.forced_matrix(_forced_losses(a), a.baseline_loss_N, a.sequence_domain_N) for a in present]
    )
    found: Results = {
        "keep_only_group": _change(present, metrics.own_group_loss),
        "keep_only_group_by_domain": {domain: stat(matrices[:, d, d].tolist()) for d, domain in enumerate(domains)},
        "forced_elsewhere": _change(present, metrics.other_groups_loss) if len(domains) > 1 else None,
        "forced_matrix": matrices.mean(axis=0).tolist(),
    }
    return found


def _change(analyses: Sequence[Ablation], forced: Callable[[Floats, Integers], Floats]) -> Results:
    """The loss under the intervention less the sample's own, mean over domains of equal weight."""
    changes = []
    for analysis in analyses:
        loss_N = forced(_forced_losses(analysis), analysis.sequence_domain_N)
        changes.append(metrics.lead(loss_N, analysis.baseline_loss_N, analysis.sequence_domain_N))
    values = [change.value for change in changes]
    return stat(values, _over_seeds(values) or changes[0])


def _forced_losses(analysis: Ablation) -> Floats:
    assert analysis.forced_loss_DN is not None
    return analysis.forced_loss_DN


def _over_seeds(values: Sequence[float]) -> Interval | None:
    return metrics.seeds_interval(values) if len(values) > 1 else None


def _percentiles(value: float, resampled: Sequence[float] | Floats) -> Interval:
    found = np.asarray(resampled)
    finite = found[np.isfinite(found)]
    unit = "evaluation sequences"
    return percentile_interval(value, finite, unit) if finite.size else Interval(value, math.nan, math.nan, unit)
