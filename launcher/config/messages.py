"""Checks a tree against a pydantic model; says in one line what is wrong, where it was written and how to mend it."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from moe_testbed.data.registry import did_you_mean
from moe_testbed.launcher.config.yaml_tree import Node, lookup, to_plain
from moe_testbed.launcher.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]
Variants = Mapping[type[BaseModel], Callable[[Any, str], type[BaseModel]]]
"""Base class -> (its mapping in the YAML, the mapping's own key) -> the class that the mapping chooses."""

_DOTTED = re.compile(r"[a-z_]\w*(?:\.\w+)+")


def validate(model: type[Model], tree: Node, variants: Variants) -> Model:
    """Returns the model's object.

    Types are strict: a number in quotes is no number.

    Raises:
        ConfigError: one line about the first thing that is wrong, and how many more there are.
    """
    try:
        return model.model_validate_json(json.dumps(to_plain(tree)), strict=True)
    except ValidationError as error:
        # An unknown key first: it often is why another key is missing.
        found = sorted(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
        more = f" ({len(found) - 1} more to mend after this)" if len(found) > 1 else ""
        raise ConfigError(_message(found[0], model, tree, variants) + more) from None


def _message(details: ErrorDetails, model: type[BaseModel], tree: Node, variants: Variants) -> str:
    location = _known_part(details["loc"], tree, details["type"])
    dotted = ".".join(map(str, location))
    if details["type"] == "extra_forbidden":
        return f"{_origin(tree, location)}: {_unknown_key(location, model, tree, variants)}"
    if details["type"] == "missing":
        description = _description(location, model, tree, variants)
        meaning = f" ({description})" if description else ""
        return f"{_origin(tree, location[:-1])}: {dotted} is missing{meaning}; it has no default"
    if details["type"] in ("value_error", "assertion_error"):
        text = str(details["msg"]).split(", ", 1)[1]
        cited = next(
            (name for name in (*_DOTTED.findall(text), text.split()[0]) if lookup(tree, name.split("."))), None
        )
        chooser = next((key for key in ("name", "kind") if not cited and lookup(tree, (*location, key))), None)
        place = cited.split(".") if cited else (*location, chooser) if chooser else location
        return f"{_origin(tree, place)}: {text if cited or not dotted else f'{dotted}: {text}'}"
    value, text = details["input"], str(details["msg"])
    written = json.dumps(value, ensure_ascii=False, default=str)
    written = written if len(written) <= 80 else f"{written[:77]}..."
    return f"{_origin(tree, location)}: {dotted} is {written}: {text[:1].lower()}{text[1:]}{_near(value, details)}"


def _near(value: Any, details: ErrorDetails) -> str:
    """Returns the nearest of a few allowed texts, as the end of a message."""
    allowed = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
    hint = did_you_mean(value, allowed)
    return f".{hint}" if hint else ""


def _unknown_key(location: Location, model: type[BaseModel], tree: Node, variants: Variants) -> str:
    *parents, key = location
    owner = _model_at(tuple(parents), model, tree, variants)
    allowed = sorted(owner.model_fields) if owner else []
    place = f"in {'.'.join(map(str, parents))}" if parents else "here"
    hint = did_you_mean(key, allowed)
    return f"unknown key '{'.'.join(map(str, location))}'.{hint} Allowed {place}: {', '.join(allowed)}"


def _description(location: Location, model: type[BaseModel], tree: Node, variants: Variants) -> str | None:
    owner = _model_at(location[:-1], model, tree, variants)
    field = owner.model_fields.get(str(location[-1])) if owner else None
    return field.description if field else None


def _known_part(location: Iterable[str | int], tree: Node, kind: str) -> Location:
    """Returns the location in the YAML: without the tags that pydantic adds for the members of a union."""
    found: Location = ()
    location = tuple(location)
    for number, key in enumerate(location):
        last = number == len(location) - 1
        if lookup(tree, (*found, key)) is not None or (last and kind == "missing"):
            found = (*found, key)
    return found


def _origin(tree: Node, location: Iterable[str | int]) -> str:
    """Returns where the value was written, or the nearest mapping around it."""
    location = tuple(location)
    for length in range(len(location), -1, -1):
        node = lookup(tree, location[:length])
        if node is not None:
            return str(node.origin)
    raise AssertionError("the root of a tree is a node")


def _model_at(location: Location, model: type[BaseModel], tree: Node, variants: Variants) -> type[BaseModel] | None:
    """Returns the class that the mapping at a location is checked against."""
    annotation: Any = model
    for number, key in enumerate(location):
        members = _members(annotation)
        owner = next((member for member in members if isinstance(member, type) and issubclass(member, BaseModel)), None)
        if owner is not None:
            if str(key) not in owner.model_fields:
                return None
            annotation = owner.model_fields[str(key)].annotation
        else:
            annotation = next(
                (get_args(member)[-1 if get_origin(member) is dict else 0] for member in members if get_args(member)),
                None,
            )
        chosen = _chosen(annotation, location[: number + 1], tree, variants)
        annotation = chosen or annotation
    return next(
        (member for member in _members(annotation) if isinstance(member, type) and issubclass(member, BaseModel)), None
    )


def _chosen(annotation: Any, location: Location, tree: Node, variants: Variants) -> type[BaseModel] | None:
    node = lookup(tree, location)
    for base in _members(annotation):
        if base in variants and node is not None:
            try:
                return variants[base](to_plain(node), str(location[-1]))
            except (ValueError, KeyError, TypeError):
                return None
    return None


def _members(annotation: Any) -> list[Any]:
    """Returns the types that an annotation allows, without Annotated, Optional and unions around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [annotation]
