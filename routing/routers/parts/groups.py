"""Groups of domains, and the partition of the experts into one group for each: the structure of the reference router.

Shape legend: D domains, J groups of experts, E experts.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Partition = Mapping[str, Sequence[str]]
"""Group -> its domains."""


@dataclass(frozen=True)
class DomainGroups:
    """Which group of experts serves which tokens.

    Every domain belongs to one family, and every family is divided into ``parts`` groups by document: part p of family
    f is group ``f * parts + p``.

    Attributes:
        family_of_domain: family of every domain, in label order.
        parts: groups per family.
    """

    family_of_domain: tuple[int, ...]
    parts: int = 1

    @property
    def num_groups(self) -> int:
        """How many groups there are (J)."""
        return (max(self.family_of_domain) + 1) * self.parts

    def domains_of(self, group: int) -> list[int]:
        """The domains that a group serves, a part of each if there are several parts."""
        return [domain for domain, family in enumerate(self.family_of_domain) if family == group // self.parts]

    def shares(self, domain_weights: Sequence[float]) -> tuple[float, ...]:
        """Expected share of the tokens that each group serves, in the scale of the domains' weights."""
        return tuple(
            sum(domain_weights[domain] for domain in self.domains_of(group)) / self.parts
            for group in range(self.num_groups)
        )


def domain_groups(domains: Sequence[str], partition: Partition | None = None, parts: int = 1) -> DomainGroups:
    """Returns the groups that serve these domains, families in the partition's order.

    Names that are no domain have no effect: a mix may have lost domains that could not be read.

    Args:
        partition: families of domains; None: every domain by itself.

    Raises:
        ValueError: a domain is in no family.
    """
    if partition is None:
        return DomainGroups(tuple(range(len(domains))), parts)
    family_of = {name: family for family, names in enumerate(partition.values()) for name in names}
    for domain in domains:
        if domain not in family_of:
            raise ValueError(
                f"routing.router.partition has no group for the domain '{domain}'; add it to one of the groups, or "
                f"give it one of its own"
            )
    # Families that have lost all their domains get no experts.
    present = sorted({family_of[domain] for domain in domains})
    return DomainGroups(tuple(present.index(family_of[domain]) for domain in domains), parts)


def refuse_unknown_domains(domains: Sequence[str], partition: Partition) -> None:
    """Guards a partition against misspelt names.

    Raises:
        ValueError: a name in the partition is no domain; the message gives the nearest one.
    """
    for family, names in partition.items():
        for name in names:
            if name not in domains:
                near = difflib.get_close_matches(name, domains, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise ValueError(
                    f"routing.router.partition.{family} names '{name}', which is no domain of the mix.{hint} "
                    f"Available: {', '.join(domains)}"
                )


def group_sizes(num_experts: int, shares: tuple[float, ...], smallest: int) -> list[int]:
    """Returns the number of experts of every group, proportional to ``shares`` by largest remainder, none below
    ``smallest``.

    Args:
        num_experts: E, the sum of the sizes.
        shares: one positive number per group.
        smallest: experts that each group needs at least (K).

    Raises:
        ValueError: the groups need more experts than there are.
    """
    if smallest * len(shares) > num_experts:
        raise ValueError(
            f"{len(shares)} groups with at least {smallest} experts each need {smallest * len(shares)} experts, but "
            f"there are {num_experts}; raise model.moe.num_experts, lower model.moe.top_k, or have fewer groups (a mix "
            f"with fewer domains, or a coarser routing.router.partition)"
        )
    spare = num_experts - smallest * len(shares)
    total = sum(shares)
    exact = [max(share / total * num_experts - smallest, 0.0) for share in shares]
    scale = spare / sum(exact) if sum(exact) > 0 else 0.0
    exact = [value * scale for value in exact]
    sizes = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda d: (sizes[d] - exact[d], d))
    for d in by_remainder[: spare - sum(sizes)]:
        sizes[d] += 1
    return [smallest + size for size in sizes]


def group_masks(sizes: list[int]) -> Tensor:
    """Says which experts belong to which group, bool [J, E]; groups are consecutive."""
    owners = [group for group, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor([[owner == group for owner in owners] for group in range(len(sizes))])
