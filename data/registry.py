"""Names that a YAML file may use, and the pydantic classes they stand for."""

import difflib
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

Model = TypeVar("Model", bound=BaseModel)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Returns the end of a message about a name that is not known: the nearest one that is, if any is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean '{near[0]}'?" if near else ""


class Registry(Generic[Model]):
    """Holds classes by the name that YAML mappings give as `kind`, or under another key; its own `kind` says in
    messages what they are.

    pydantic's discriminated unions choose by `kind` too, but name neither the nearest nor, in words, the allowed ones,
    and know no short form without a mapping.
    """

    def __init__(self, kind: str, key: str = "kind") -> None:
        self.kind, self.key = kind, key
        self._classes: dict[str, type[Model]] = {}

    def register(self, name: str) -> Callable[[type[Model]], type[Model]]:
        """Returns a class decorator that makes a class known as `name`. Raises ValueError if the name is taken."""

        def add(cls: type[Model]) -> type[Model]:
            if name in self._classes:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """Returns all names, sorted."""
        return sorted(self._classes)

    def get(self, name: object) -> type[Model]:
        """Returns the class known as `name`. Raises ValueError, with the nearest name and all names, if unknown or if
        it is none, as a mapping that YAML gave is."""
        if isinstance(name, str) and name in self._classes:
            return self._classes[name]
        hint = did_you_mean(name, self._classes)
        raise ValueError(f"Unknown {self.kind} '{name}'.{hint} Available: {', '.join(self.names())}")

    def parse(self, value: Any) -> Any:
        """Validates a field: a mapping with the key (or just its value, as a string) becomes an instance.

        Anything else is left to pydantic. Errors inside the mapping keep their place in the YAML.
        """
        if isinstance(value, str):
            value = {self.key: value}
        if not isinstance(value, dict):
            return value
        if self.key not in value:
            article = "An" if self.kind[0] in "aeiou" else "A"
            raise ValueError(
                f"{article} {self.kind} is missing: add `{self.key}:`. Available: {', '.join(self.names())}"
            )
        return self.get(value[self.key]).model_validate(value)
