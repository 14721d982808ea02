"""Sends what a store refuses as a whole in parts, so that one thing that it does not take holds up no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from moe_testbed.launcher.tracking.values import OLDER_LENGTHS, shortened

Item = TypeVar("Item")


def send_in_parts(
    items: Sequence[Item], send: Callable[[Sequence[Item]], object], refuses: Callable[[Exception], bool]
) -> list[tuple[Item, Exception]]:
    """Sends all items at once; if that is refused, each half, down to the single item.

    Args:
        refuses: tells whether an error is about what was sent. Others are raised.

    Returns:
        The items that are refused alone too, each with the error.
    """
    if not items:
        return []
    try:
        send(items)
    except Exception as error:
        if not refuses(error):
            raise
        if len(items) == 1:
            return [(items[0], error)]
        middle = len(items) // 2
        return [refused for half in (items[:middle], items[middle:]) for refused in send_in_parts(half, send, refuses)]
    return []


def send_texts(
    texts: Sequence[tuple[str, str]],
    send: Callable[[Sequence[tuple[str, str]]], object],
    refuses: Callable[[Exception], bool],
) -> list[tuple[str, Exception]]:
    """Sends pairs of a key and a text as `send_in_parts` does; a text that is refused is sent shorter.

    Returns:
        The keys of those that are refused at every length, each with the error.
    """
    refused = send_in_parts(texts, send, refuses)
    for length in OLDER_LENGTHS:
        shorter = [(key, shortened(text, length)) for (key, text), _ in refused if len(text) > length]
        refused = [one for one in refused if len(one[0][1]) <= length] + send_in_parts(shorter, send, refuses)
    return [(key, error) for (key, _), error in refused]
