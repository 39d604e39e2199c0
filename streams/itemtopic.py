"""The topic `items` written from outside: what `browsecast items publish` and `browsecast items remove` do."""

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from streams import wire
from streams.events import MAX_NAME
from streams.lines import BadLine, LogCount, bad_line, log_files, read_lines
from streams.outlet import Outlet
from streams.settings import Settings

_decode = msgspec.json.Decoder(wire.Item).decode


def publish(settings: Settings, path: str | Path, on_bad: Callable[[BadLine], None]) -> int:
    """Publish JSON lines of items, bytes unchanged, keyed by item_id; how many they were.

    path: a file, a directory or `-` for standard input. A line that is no item is given to `on_bad` and left out.
    Raises as `Outlet` does, and `UsageError` for a file that cannot be read.
    """
    outlet, published = Outlet(settings, wire.ITEMS), 0
    for file in log_files(path):
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
    """Publish a null value for each item. Raises as `Outlet` does."""
    outlet = Outlet(settings, wire.ITEMS)
    for item_id in item_ids:
        outlet.send(item_id.encode(), None)
    outlet.flush()


def _keyed(number: int, line: str) -> tuple[bytes, bytes] | BadLine | None:
    """Key and value of a JSON line; None for an empty one."""
    if not line or line.isspace():
        return None
    try:
        item_id = _decode(line).item_id
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        return bad_line(number, str(error), line)
    if not 0 < len(item_id) <= MAX_NAME:
        return bad_line(number, f"its item_id has no characters, or more than {MAX_NAME}", line)
    return item_id.encode(), line.rstrip("\r").encode()
