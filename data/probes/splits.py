"""Which documents of a probing task are trained on, and which are tested on. Documents are never cut in two."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple

from pydantic import BaseModel, Field

from moe_testbed.data.errors import DataError
from moe_testbed.data.registry import Registry


class Parts(NamedTuple):
    """The names of the documents of each part of a task, in an order that has nothing to do with what they are."""

    train: list[str]
    test: list[str]


def shuffled(documents: Sequence[str], seed: int) -> list[str]:
    """Returns documents in an order that depends on their names and the seed alone."""
    return sorted(documents, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())


class Split(BaseModel, ABC, extra="forbid", frozen=True):
    """Says how the documents of a task are split.

    seed: decides the order of the documents, and so which are taken where there are more than enough.
    """

    kind: str
    seed: int = Field(default=0, ge=0)

    @abstractmethod
    def parts(self, documents: Sequence[str], is_new: Callable[[str], bool]) -> Parts:
        """Returns the documents of both parts, by name.

        is_new: tells whether a document was certainly not pre-trained on. Raises DataError if a part is empty.
        """


split_kinds: Registry[Split] = Registry("split")


@split_kinds.register("random")
class RandomSplit(Split):
    """Takes a share of the documents, drawn by the seed, for the test."""

    kind: str = "random"
    test: float = Field(default=0.25, gt=0, lt=1, description="share of the documents")

    def parts(self, documents: Sequence[str], is_new: Callable[[str], bool]) -> Parts:
        ordered = shuffled(documents, self.seed)
        tested = round(len(ordered) * self.test)
        return _not_empty(Parts(ordered[tested:], ordered[:tested]))


@split_kinds.register("named")
class NamedSplit(Split):
    """Takes documents by their names: globs, in which `*` stands for anything. Others are left out."""

    kind: str = "named"
    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)

    def parts(self, documents: Sequence[str], is_new: Callable[[str], bool]) -> Parts:
        ordered = shuffled(documents, self.seed)
        train, test = (
            [name for name in ordered if any(fnmatchcase(name, glob) for glob in globs)]
            for globs in (self.train, self.test)
        )
        if both := set(train) & set(test):
            raise DataError(f"the split has '{min(both)}' in train and in test: correct its globs")
        return _not_empty(Parts(train, test))


@split_kinds.register("held_out")
class HeldOutSplit(Split):
    """Tests on documents that were not pre-trained on, for a task whose source is a part of the mix: those that the
    mix holds out or leaves out. At most a share of all documents is taken; the others are trained on."""

    kind: str = "held_out"
    test: float = Field(default=0.25, gt=0, lt=1, description="share of the documents, at most")

    def parts(self, documents: Sequence[str], is_new: Callable[[str], bool]) -> Parts:
        ordered = shuffled(documents, self.seed)
        test = list(islice(filter(is_new, ordered), max(1, round(len(ordered) * self.test))))
        if not test:
            raise DataError(
                f"all {len(ordered):,} documents were trained on, or are too short to tell, and none is left to test "
                "on: take a run whose mix holds some of them out"
            )
        taken = set(test)
        return _not_empty(Parts([name for name in ordered if name not in taken], test))


def _not_empty(parts: Parts) -> Parts:
    for name, documents in parts._asdict().items():
        if not documents:
            raise DataError(f"the split leaves no document for {name}: correct it, or add text")
    return parts
