"""The text in a field of a record."""

from collections.abc import Iterable, Mapping
from typing import Any

NAMES_SHOWN = 20
KINDS = (
    (str, "text"),
    (bool, "true or false"),
    ((int, float), "a number"),
    ((list, tuple), "a list"),
    (Mapping, "an object"),
)


def text_of(record: Any, field: str) -> str:
    """Returns the text of a field; `meta.text` is the field `text` of the field `meta` if none has the whole name.

    Bytes are read as UTF-8: Parquet has writers that do not mark their strings as such. Raises ValueError if there is
    no such field, or if it holds no text.
    """
    if isinstance(record, Mapping) and field in record:
        value = record[field]
    else:
        value = record
        for name in field.split("."):
            if not isinstance(value, Mapping):
                raise ValueError(f"it is {kind_of(value)}, not an object with the field '{name}'")
            if name not in value:
                raise ValueError(missing(field, value))
            value = value[name]
    if isinstance(value, bytes):
        value = value.decode()
    if not isinstance(value, str):
        raise ValueError(f"{field} is null" if value is None else f"{field} is {kind_of(value)}, not text")
    return value


def kind_of(value: Any) -> str:
    """Returns what a value of JSON is, in words."""
    if value is None:
        return "null"
    return next((words for types, words in KINDS if isinstance(value, types)), type(value).__name__)


def missing(field: str, names: Iterable[object]) -> str:
    """Returns the message about a field that is not there, with those that are."""
    found = list(map(str, names))
    more = ", ..." if len(found) > NAMES_SHOWN else ""
    return f"there is no field '{field}' (there are: {', '.join(found[:NAMES_SHOWN])}{more})"
