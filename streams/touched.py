"""The items a visitor touched last, and those just bought: what retrieval knows beside the seed events. Pure."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

BOUGHT_SESSIONS = 3  # what was bought in so many sessions, the one that closes included, counts as just bought

NOTHING_TOUCHED = msgspec.Raw(b"\xc0")  # null: what is kept of a visitor who never touched an item


class Kept(msgspec.Struct, array_like=True, gc=False):
    """In the visitor's record: items touched, the newest first, and bought ones with the number of the session."""

    items: list[str] = []
    bought: list[tuple[str, int]] = []


class Touched(NamedTuple):
    """Distinct items, the newest first."""

    items: list[str]
    bought: list[str]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Kept | None).decode


def touched_of(kept: msgspec.Raw) -> Kept:
    """What is in a visitor's record."""
    return _decode(kept) or Kept()


def touch(
    kept: msgspec.Raw, items: Sequence[str | None], bought: Sequence[str], number: int, most: int
) -> tuple[msgspec.Raw, Touched]:
    """What to keep of the visitor after session `number`, and what its context says: at most `most` of each.

    `items` are those of the session's events, in order; `bought` those of its purchases.
    """
    before = _decode(kept)
    newest = dict.fromkeys(reversed(items))
    newest.pop(None, None)
    purchases = {item: number for item in reversed(bought)} if bought else {}
    if before is not None:
        newest |= dict.fromkeys(before.items)
        for item, when in before.bought:
            if when > number - BOUGHT_SESSIONS:
                purchases.setdefault(item, when)
    elif not newest:
        return NOTHING_TOUCHED, Touched([], [])
    found: list[Any] = list(newest)[:most]
    pairs = list(purchases.items())[:most] if purchases else []
    return msgspec.Raw(_encode((found, pairs))), Touched(found, [item for item, _ in pairs])
