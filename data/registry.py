"""Names that a YAML file may use, and the pydantic classes they stand for."""

import difflib
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)


class Registry(Generic[Model]):
    """Maps the `kind` of a YAML mapping to the pydantic class that validates the rest of it."""

    def __init__(self, noun: str) -> None:
        self._noun = noun
        self._classes: dict[str, type[Model]] = {}

    def register(self, kind: str) -> Callable[[type[Model]], type[Model]]:
        """Class decorator. Raises ValueError if the kind is taken."""

        def add(cls: type[Model]) -> type[Model]:
            if kind in self._classes:
                raise ValueError(f"{self._noun} '{kind}' is registered twice: {self._classes[kind]} and {cls}")
            self._classes[kind] = cls
            return cls

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __getitem__(self, kind: str) -> type[Model]:
        """Raises ValueError with the nearest kind and all kinds if there is no such one."""
        if kind not in self._classes:
            nearest = difflib.get_close_matches(str(kind), list(self), n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(f"Unknown {self._noun} '{kind}'.{hint} Available: {', '.join(self)}")
        return self._classes[kind]

    def parse(self, value: Any) -> Any:
        """Validator for a field: a mapping with `kind` (or just the kind, as a string) becomes an instance.

        Anything else is handed on for pydantic to judge. Errors inside the mapping keep their place in the YAML.
        """
        if isinstance(value, str):
            value = {"kind": value}
        if not isinstance(value, dict):
            return value
        if "kind" not in value:
            raise ValueError(f"A {self._noun} is missing: add `kind:`. Available: {', '.join(self)}")
        return self[value["kind"]].model_validate(value)
