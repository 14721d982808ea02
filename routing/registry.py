"""Names of routers and balancers, as configs write them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Classes by name; ``kind`` says in messages what they are."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that makes a class known as ``name``. Raises ValueError if the name is taken."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        """The class known as ``name``.

        Raises:
            ValueError: no such name; the message gives the nearest one and all that there are.
        """
        if name in self._classes:
            return self._classes[name]
        near = difflib.get_close_matches(str(name), self._classes, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self.names())}")
