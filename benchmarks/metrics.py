"""How long do metrics of counts, the vocabulary's level of chance and intervals take, and how often do intervals hold?

    python benchmarks/metrics.py [--layers 64] [--experts 256] [--domains 64] [--rounds 3]

Every metric of counts on every layer's table, as the report asks for them (the best of the rounds, so that whatever
else the machine does counts least); one layer's level of chance for 2,048 token ids; the interval of one metric of one
layer over documents. Last, in 200 simulated evaluations whose routing is known, how often the interval of the domain
information holds its true value, beside the usual percentile interval.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from moe_testbed.routing import metrics

COUNT_METRICS: tuple[Callable[..., object], ...] = (
    metrics.mutual_information,
    metrics.domain_information,
    metrics.nmi_geometric,
    metrics.purity,
    metrics.matched_purity,
    metrics.matched_groups,
    metrics.reference_agreement,
    metrics.effective_experts,
    metrics.normalised_effective_experts,
    metrics.inverse_simpson,
    metrics.dead_experts,
    metrics.coefficient_of_variation,
    metrics.max_violation,
    metrics.gini,
    metrics.conditional,
    metrics.load,
    metrics.owners,
)
TRIALS = 200


def best_seconds(work: Callable[[int], object], rounds: int) -> float:
    """Returns the shortest of the rounds; each has its number, so that none finds what another computed."""
    seconds = []
    for number in range(rounds):
        started = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def count_metrics(layers: int, domains: int, experts: int, rounds: int) -> float:
    """Returns the seconds for all metrics of all layers, on specialised and uneven routing."""
    rng = np.random.default_rng(0)
    routing_YDE = rng.dirichlet(np.full(experts, 0.2), (rounds, layers, domains))
    counts = rng.poisson(4096 * routing_YDE)

    def work(number: int) -> None:
        for metric in COUNT_METRICS:
            for counts_DE in counts[number]:
                metric(counts_DE)

    return best_seconds(work, rounds)


def chance(experts: int, occurrences: int, rounds: int) -> float:
    """Returns the seconds for the level of chance of 2,048 token ids as frequent as words, in one layer."""
    rng = np.random.default_rng(0)
    words = 1 / np.arange(1, 2049)
    totals = 10 + rng.multinomial(occurrences, words / words.sum())
    load = rng.dirichlet(np.full(experts, 3.0))
    counts_VE = np.stack([rng.multinomial(total, load) for total in totals])
    return best_seconds(lambda _: metrics.token_information_chance(counts_VE), rounds)


def evaluation(seed: int, routing_DE: np.ndarray, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns counts [C, E] and domains [C] of documents whose routing differs around that of their domain."""
    rng = np.random.default_rng(seed)
    counts = [rng.multinomial(512, rng.dirichlet(30 * p_E + 1e-9)) for p_E in routing_DE for _ in range(documents)]
    return np.stack(counts), np.repeat(np.arange(len(routing_DE)), documents)


def coverage() -> tuple[int, int]:
    """Returns how many of the simulated evaluations' intervals, and of their percentile ones, hold the true value."""
    routing_DE = np.random.default_rng(12345).dirichlet(np.full(32, 0.3), 8)
    truth, own, percentile = metrics.domain_information(routing_DE), 0, 0
    for trial in range(TRIALS):
        found = metrics.counts_interval(metrics.domain_information, *evaluation(trial, routing_DE, 16))
        own += found.low <= truth <= found.high
        percentile += 2 * found.value - found.high <= truth <= 2 * found.value - found.low
    return own, percentile


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--domains", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    table = f"{given.layers} layers x {given.experts} experts x {given.domains} domains"
    seconds = count_metrics(given.layers, given.domains, given.experts, given.rounds)
    print(f"{len(COUNT_METRICS)} count metrics, {table}: {seconds:.2f} s")
    said = {"metrics": f"{seconds:.1f} s"}
    for occurrences in (65_536, 1_000_000):
        seconds = chance(given.experts, occurrences, given.rounds)
        size = f"2,048 ids x {given.experts} experts, {occurrences:,} occurrences"
        print(f"level of chance of the vocabulary, {size}: {seconds:.2f} s a layer")
    for domains, experts in ((8, 32), (given.domains, given.experts)):
        routing_DE = np.random.default_rng(1).dirichlet(np.full(experts, 0.3), domains)
        drawn = evaluation(0, routing_DE, 16)
        seconds = best_seconds(lambda _, d=drawn: metrics.counts_interval(metrics.domain_information, *d), given.rounds)
        print(f"interval over 16 documents a domain, {domains} x {experts}: {1000 * seconds:.0f} ms a metric and layer")
    own, percentile = coverage()
    print(f"the true domain information is held by {own} of {TRIALS} intervals, {percentile} percentile intervals")
    said |= {"coverage": f"{own} ({100 * own / TRIALS:.0f} %)", "percentile_coverage": str(percentile)}
    print(json.dumps({"figures": said}))


if __name__ == "__main__":
    main()
