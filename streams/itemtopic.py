"""The topic `items` written from outside: what `browsecast items publish` and `browsecast items remove` do."""

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from streams import wire
from streams.errors import UsageError
from streams.events import MAX_NAME
from streams.lines import SHOWN_CHARACTERS, BadLine, LogCount, bad_line, log_files, read_lines
from streams.outlet import Outlet
from streams.settings import Settings

_decode = msgspec.json.Decoder(wire.Item).decode


def publish(settings: Settings, path: str | Path, on_bad: Callable[[BadLine], None]) -> int:
    """Publish JSON lines of items, bytes unchanged, keyed by item_id; how many they were.

    path: a file, a directory or `-` for standard input. A line that is no item is given to `on_bad` and left out.
    Raises as `Outlet` does, and `UsageError` for a file that cannot be read.
    """
    files = log_files(path)
    outlet, published = Outlet(settings, wire.ITEMS), 0
    for file in files:
        for number, line in read_lines(file, LogCount()):
            keyed = line if isinstance(line, BadLine) else _keyed(number, line)
            if isinstance(keyed, BadLine):
                on_bad(keyed)
            elif keyed is not None:
                outlet.send(*keyed)
                published += 1
    outlet.flush()
    return published


def remove(settings: Settings, item_ids: Iterable[str]) -> None:
    """Publish a null value for each item. Raises as `Outlet` does, and `UsageError` before for what is no item's id."""
    try:
        keys = [_key(item_id) for item_id in item_ids]
    except ValueError as error:
        raise UsageError(f"nothing was removed: {error}") from None
    outlet = Outlet(settings, wire.ITEMS)
    for key in keys:
        outlet.send(key, None)
    outlet.flush()


def _key(item_id: str) -> bytes:
    """What the item's records are found by. Raises ValueError for an id that workers refuse."""
    if not item_id or len(item_id) > MAX_NAME:
        raise ValueError(f"the item_id {item_id[:SHOWN_CHARACTERS]!r} has no characters, or more than {MAX_NAME}")
    return item_id.encode()


def _keyed(number: int, line: str) -> tuple[bytes, bytes] | BadLine | None:
    """Key and value of a JSON line; None for an empty one."""
    if not line or line.isspace():
        return None
    try:
        return _key(_decode(line).item_id), line.rstrip("\r").encode()
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        return bad_line(number, str(error), line)
