"""Rows of CSV, JSON lines and Parquet as events, by the columns that the profile names."""

import csv
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow
import pyarrow.parquet

from streams.envelopes import lookup, unwrap
from streams.errors import UsageError
from streams.lines import BadLine, LogCount, bad_line, read_lines
from streams.profilefile import Columns
from streams.profiles import SiteProfile, zone
from streams.times import time_parser
from streams.wire import Event

BATCH_ROWS = 16_384
WIRE_COLUMNS = Columns(
    user="user_id",
    time="ts",
    page="page",
    type="type",
    item="item_id",
    price="price",
    category="category",
    query="query",
    device="device",
    event_id="event_id",
)

Pick = Callable[[Any], Any]  # row -> value


class BadRow(ValueError):
    """A row that is no event; the message says why."""


class RowMapper:
    """Makes events of rows. `locate` turns a column's name into the function that finds it in a row."""

    def __init__(self, profile: SiteProfile, columns: Columns, locate: Callable[[str], Pick]) -> None:
        """Raises what `locate` raises for a column that is not there."""
        self._resolve = profile.resolve
        self._columns = columns
        log = profile.log
        self._user = _first(columns.user, locate)
        self._time = _joined(columns.time, locate)
        self._after = _first(columns.after_ms, locate)
        self._parse = time_parser(log.time_format, zone(log.timezone))
        self._skips = [(locate(skip.column), frozenset(skip.values)) for skip in log.skip]
        self._page, self._type = _first(columns.page, locate), _first(columns.type, locate)
        self._item, self._category = _first(columns.item, locate), _first(columns.category, locate)
        self._price, self._query = _first(columns.price, locate), _first(columns.query, locate)
        self._device, self._event_id = _first(columns.device, locate), _first(columns.event_id, locate)

    def event(self, row: Any, place: str) -> Event | None:
        """The event in `row`, None when the profile says that it is no click. Raises `BadRow`."""
        for pick, values in self._skips:
            if _text(pick(row)) in values:
                return None
        user = _text(self._user(row))
        if user is None:
            raise BadRow(f"has no user ({self._columns.user})")
        item, page = _text(self._item(row)), _text(self._page(row))
        category = _text(self._category(row))
        if page is None and item is None and category is None:
            raise BadRow(f"has no page ({self._columns.page or self._columns.item or self._columns.category})")
        named = self._resolve(page or "", item, category, _text(self._type(row)) or "view")
        if named is None:
            return None
        try:
            ts = self._parse(self._time(row)) + int(self._after(row) or 0)
        except (TypeError, ValueError) as error:
            raise BadRow(str(error)) from None
        return Event(
            user,
            ts,
            named.page,
            _text(self._event_id(row)) or place,
            named.type,
            named.item_id,
            _price(self._price(row)),
            named.category,
            _text(self._query(row)),
            _text(self._device(row)),
        )


def read_csv(path: Path | None, name: str, profile: SiteProfile, count: LogCount) -> Iterator[Event | BadLine]:
    """Events of a CSV file. Raises `UsageError` when a column of the profile is not in its header."""
    log = profile.log
    feed = _Feed(read_lines(path, count))
    rows = csv.reader(
        feed,
        delimiter=log.delimiter,
        quotechar=log.quote or None,
        quoting=csv.QUOTE_MINIMAL if log.quote else csv.QUOTE_NONE,
        strict=True,
    )
    header = log.header or [column.removeprefix("\ufeff") for column in next(rows, [])]
    mapper = RowMapper(profile, log.columns or _wire_columns(header), _column_finder(header, name, profile))
    width = len(header)
    while True:
        feed.taken.clear()
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield bad_line(feed.first, f"is no CSV ({error})", feed.taken[0] if feed.taken else "")
            feed.give_back()
            continue
        yield from feed.bad()
        if row is None:
            return
        if not row:
            continue
        try:
            if len(row) != width:
                raise BadRow(f"has {len(row)} columns instead of {width}")
            event = mapper.event(row, f"{name}:{feed.first}")
        except BadRow as error:
            yield bad_line(feed.first, str(error), log.delimiter.join(row))
            continue
        if event is None:
            count.skipped += 1
        else:
            yield event


class _Feed:
    """Lines for the CSV reader. Those of the row under way can be given back, for when a quote never closes."""

    def __init__(self, lines: Iterator[tuple[int, str | BadLine]]) -> None:
        self._lines = lines
        self._again: deque[tuple[int, str]] = deque()
        self._bad: list[BadLine] = []
        self._number = 0
        self.taken: list[str] = []

    @property
    def first(self) -> int:
        """The number of the first line of the row under way."""
        return self._number - max(len(self.taken) - 1, 0)

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if self._again:
            self._number, again = self._again.popleft()
            self.taken.append(again)
            return again
        for number, line in self._lines:
            if isinstance(line, BadLine):
                self._bad.append(line)
                continue
            self._number = number
            self.taken.append(line + "\n")
            return self.taken[-1]
        raise StopIteration

    def give_back(self) -> None:
        """All lines of the row but its first are to be read again."""
        first = self.first
        self._again.extendleft(reversed(list(enumerate(self.taken, first))[1:]))

    def bad(self) -> Iterator[BadLine]:
        """The lines that could not be read, each once."""
        bad, self._bad = self._bad, []
        yield from bad


def read_json(path: Path | None, name: str, profile: SiteProfile, count: LogCount) -> Iterator[Event | BadLine]:
    """Events of JSON lines: by the profile's columns, or else events of the wire and known envelopes."""
    mapper, each = _document_mapper(profile), profile.log.each
    flat = profile.log.columns is None
    decode = msgspec.json.Decoder().decode
    for number, line in read_lines(path, count):
        if isinstance(line, BadLine):
            yield line
            continue
        if not line or line.isspace():
            continue
        try:
            document = decode(line)
            if not isinstance(document, dict):
                raise BadRow("is no JSON object")
            clicks = [(document, str(number))] if each is None else _each(document, each, number)
            for click, place in clicks:
                event = mapper.event((unwrap(click) or click) if flat else click, f"{name}:{place}")
                if event is None:
                    count.skipped += 1
                    continue
                if flat and isinstance(click.get("attributes"), dict):
                    event.attributes = click["attributes"]
                yield event
        except (msgspec.DecodeError, BadRow, RecursionError) as error:
            yield bad_line(number, str(error), line)


def _each(document: dict[str, Any], path: str, number: int) -> list[tuple[dict[str, Any], str]]:
    """The clicks of a document that holds a whole session, each beside what they share, and their places."""
    clicks = document.get(path)
    if not isinstance(clicks, list):
        raise BadRow(f"has no list {path!r}")
    return [({**document, path: click}, f"{number}.{at}") for at, click in enumerate(clicks, 1)]


def read_parquet(path: Path | None, name: str, profile: SiteProfile, count: LogCount) -> Iterator[Event | BadLine]:
    """Events of a Parquet file, batch by batch; a row's number from 1 stands for its line.

    Raises `UsageError` when it is no Parquet file, or lacks a column of the profile.
    """
    if path is None:
        raise UsageError("Parquet cannot be read from standard input: name the file")
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UsageError(f"log {path}: is no Parquet file ({error})") from error
    columns = profile.log.columns
    needed = None if columns is None else _needed(columns, profile)
    finder = _column_finder(needed or [], name, profile, file.schema_arrow.names)
    mapper = _document_mapper(profile) if columns is None else RowMapper(profile, columns, finder)
    before, size, number = count.bytes_read, path.stat().st_size, 0
    for batch in file.iter_batches(BATCH_ROWS, columns=needed):
        for row in _rows(batch, needed):
            number += 1
            try:
                document = (unwrap(row) or row) if needed is None else row
                event = mapper.event(document, f"{name}:{number}")
            except BadRow as error:
                yield bad_line(number, str(error), str(row))
                continue
            if event is None:
                count.skipped += 1
            else:
                yield event
        count.bytes_read = before + size * number // max(file.metadata.num_rows, 1)


def _rows(batch: pyarrow.RecordBatch, needed: list[str] | None) -> Iterator[Any]:
    """The batch's rows: tuples in the order of `needed`, or dictionaries."""
    if needed is None:
        return iter(batch.to_pylist())
    return zip(*(batch.column(name).to_pylist() for name in needed), strict=True)


def _needed(columns: Columns, profile: SiteProfile) -> list[str]:
    names = [name for field in msgspec.structs.asdict(columns).values() for name in _names(field)]
    return list(dict.fromkeys([*names, *(skip.column for skip in profile.log.skip)]))


def _wire_columns(header: Sequence[str]) -> Columns:
    """The columns named as the fields of the wire, where the file has them; user, time and page it must have."""
    fields = msgspec.structs.asdict(WIRE_COLUMNS)
    needed = ("user", "time", "page")
    return Columns(**{field: name for field, name in fields.items() if name in header or field in needed})


def _document_mapper(profile: SiteProfile) -> RowMapper:
    return RowMapper(profile, profile.log.columns or WIRE_COLUMNS, lambda path: lambda row: lookup(row, path))


def _column_finder(
    header: Sequence[str], name: str, profile: SiteProfile, there: Sequence[str] | None = None
) -> Callable[[str], Pick]:
    """Finds columns by their place in `header`; `there` are the columns of the file where these are more."""
    known = header if there is None else there

    def locate(column: str) -> Pick:
        if column not in known:
            raise UsageError(
                f"log {name}: has no column {column!r} that {profile.where} reads; it has {', '.join(known)}"
            )
        at = header.index(column)
        return lambda row: row[at]

    return locate


def _names(column: str | list[str] | None) -> list[str]:
    return [column] if isinstance(column, str) else column or []


def _first(column: str | list[str] | None, locate: Callable[[str], Pick]) -> Pick:
    picks = [locate(name) for name in _names(column)]
    if len(picks) <= 1:
        return picks[0] if picks else _absent
    return lambda row: next((value for pick in picks if (value := pick(row)) not in (None, "")), None)


def _absent(row: Any) -> None:
    """A field that the log does not have."""


def _joined(column: str | list[str], locate: Callable[[str], Pick]) -> Pick:
    picks = [locate(name) for name in _names(column)]
    return picks[0] if len(picks) == 1 else lambda row: " ".join(str(pick(row)) for pick in picks)


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value or None
    if value is None or value != value:  # NaN: how pandas writes an empty cell
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _price(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        price = float(value)
    except (TypeError, ValueError):
        raise BadRow(f"price {value!r} is not a number") from None
    if math.isinf(price):
        raise BadRow(f"price {value!r} is not finite")
    return None if math.isnan(price) else price
