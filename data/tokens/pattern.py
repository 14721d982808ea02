"""Which domain each draw is from: a fixed periodic pattern in the proportions of the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

import numpy as np
import numpy.typing as npt

from moe_testbed.data.errors import DataError

LONGEST_PERIOD = 4096


@dataclass(frozen=True)
class Pattern:
    """domains_X: domain of each slot of a period; ranks_X: how many earlier slots of the period have that domain;
    counts_D: slots of each domain in a period."""

    domains_X: npt.NDArray[np.int64]
    ranks_X: npt.NDArray[np.int64]
    counts_D: npt.NDArray[np.int64]

    def draw(self, number: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns of draw number n (its domain, how many earlier draws were from that domain); any shape, O(1)."""
        period, slot = np.divmod(number, len(self.domains_X))
        domain = self.domains_X[slot]
        return domain, period * self.counts_D[domain] + self.ranks_X[slot]


def make_pattern(weights: Sequence[float]) -> Pattern:
    """Returns the pattern for weights of domains 0, 1, ...; weights are exact decimals ("0.3" is 3/10).

    The period is the shortest that gives every domain exactly its share; where that is longer than LONGEST_PERIOD, it
    is LONGEST_PERIOD with shares by largest remainder. The slots of a domain are spread evenly over the period, so that
    any batch is near the proportions. Raises DataError if a domain with a positive weight gets no slot.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = min(lcm(*(share.denominator for share in shares)), LONGEST_PERIOD)
    counts = largest_remainder(shares, period)
    for domain, (share, count) in enumerate(zip(shares, counts, strict=True)):
        if share > 0 and count == 0:
            raise DataError(
                f"domain number {domain} has {float(share):.2g} of the weight, less than one draw in "
                f"{LONGEST_PERIOD}: raise its weight or set it to 0"
            )
    slots = sorted(
        (Fraction(2 * rank + 1, 2 * count), domain, rank)
        for domain, count in enumerate(counts)
        for rank in range(count)
    )
    return Pattern(
        domains_X=np.array([domain for _, domain, _ in slots], dtype=np.int64),
        ranks_X=np.array([rank for _, _, rank in slots], dtype=np.int64),
        counts_D=np.array(counts, dtype=np.int64),
    )


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Returns whole numbers that add up to total in the shares' proportions (Hamilton's method; ties to the first)."""
    counts = [int(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda domain: (counts[domain] - shares[domain] * total, domain))
    for domain in by_remainder[: total - sum(counts)]:
        counts[domain] += 1
    return counts


def weights_of(domains: Sequence[str], weights: Mapping[str, float] | None, dropped: Mapping[str, str]) -> list[float]:
    """Returns the weights of a store's domains in order; without weights all are equal.

    dropped: domains that the mix has but the store lacks; their weights are passed over.
    Raises DataError if a domain has no weight, a weight has no domain, a weight is negative, or all are zero.
    """
    if weights is None:
        return [1.0] * len(domains)
    unknown = [name for name in weights if name not in domains and name not in dropped]
    missing = [name for name in domains if name not in weights]
    if unknown or missing:
        wrong = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise DataError(f"domain_weights do not fit the store ({wrong}). Its domains: {', '.join(domains)}")
    chosen = [weights[name] for name in domains]
    if min(chosen) < 0 or max(chosen) == 0:
        raise DataError(f"domain_weights are {chosen}: none may be negative and one at least must be positive")
    return chosen
