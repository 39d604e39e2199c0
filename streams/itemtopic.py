"""The topic `items` from outside: what `browsecast items publish` and `remove` do, and what the trainer reads."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from streams import tail, wire
from streams.errors import UsageError, WrongTopics
from streams.events import MAX_NAME
from streams.lines import SHOWN_CHARACTERS, BadLine, LogCount, bad_line, log_files, read_lines
from streams.outlet import Outlet
from streams.settings import Settings

log = structlog.get_logger(__name__)
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


def save(settings: Settings, path: Path) -> int:
    """Write what is said of each item now into a file of JSON lines, as `publish` takes it; how many items they are.

    Without an item, or without the topic, there is no file. A record that cannot be read changes nothing. Raises
    BrokerUnavailable.
    """
    items: dict[str, bytes] = {}
    try:
        for message in tail.until_end(settings, settings.topic(wire.ITEMS)):
            if (read := readable(message)) is None:
                continue
            item_id, item = read
            if item is None:
                items.pop(item_id, None)
            else:
                items[item_id] = msgspec.json.encode(item)  # one line, however it was written
    except WrongTopics as error:
        log.warning("nothing is known of the items", error=str(error))
    if items:
        path.write_bytes(b"".join(line + b"\n" for line in items.values()))
    return len(items)


def readable(message: Any) -> tuple[str, wire.Item | None] | None:
    """The item of a record and what is said of it, None once it is gone; no pair, and a warning, for no item."""
    try:
        return _read(message.key(), message.value())
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        place = f"{message.topic()}/{message.partition()}@{message.offset()}"
        log.warning("a record of the topic items cannot be read and is ignored", place=place, error=str(error))
        return None


def _read(key: bytes | None, value: bytes | None) -> tuple[str, wire.Item | None]:
    if not key:
        raise ValueError("it has no key, which must be the item's id")
    item_id = key.decode()
    if value is None:
        return item_id, None
    item = _decode(value)
    if item.item_id != item_id or len(item_id) > MAX_NAME:
        raise ValueError(f"its item_id is {item.item_id[:100]!r}, but its key {item_id[:100]!r}")
    return item_id, item


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
