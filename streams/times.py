"""Times of logs, in whatever form, as epoch milliseconds, UTC."""

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache, partial
from typing import Any

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
END_MS = 253_402_300_800_000  # the year 10000: larger numbers are no times
MONTHS = dict(Jan=1, Feb=2, Mar=3, Apr=4, May=5, Jun=6, Jul=7, Aug=8, Sep=9, Oct=10, Nov=11, Dec=12)
CACHED_TIMES = 65_536


def epoch_ms(time: datetime, zone: tzinfo = UTC) -> int:
    """Epoch milliseconds of `time`, rounded down; without an offset it is in `zone`."""
    return ((time if time.tzinfo is not None else time.replace(tzinfo=zone)) - EPOCH) // MILLISECOND


def time_parser(form: str, zone: tzinfo) -> Callable[[Any], int]:
    """The function from a value to epoch milliseconds; it raises `ValueError` when the value is no such time.

    form: `iso` (ISO 8601, also with " UTC" at the end; a whole number is epoch milliseconds), `ms`, `s` or `us` (since
    the epoch; text or number), or a pattern of strptime. A ready `datetime` is taken in any form.
    zone: of times without an offset.
    """
    per_second = {"s": 1, "ms": 1_000, "us": 1_000_000}
    if form in per_second:
        return partial(_from_number, per_second[form])
    parse = lru_cache(CACHED_TIMES)(partial(_from_iso if form == "iso" else partial(_from_pattern, form), zone))

    def from_text(value: Any) -> int:
        if isinstance(value, str):
            return parse(value)
        if isinstance(value, datetime):
            return epoch_ms(value, zone)
        if form == "iso" and isinstance(value, int) and not isinstance(value, bool):
            return _from_number(1_000, value)
        raise ValueError("has no time" if value is None else f"time {value!r} does not have the form {form!r}")

    return from_text


def _from_iso(zone: tzinfo, text: str) -> int:
    try:
        return epoch_ms(datetime.fromisoformat(text.removesuffix(" UTC")), UTC if text.endswith(" UTC") else zone)
    except (ValueError, OverflowError):
        raise ValueError(f"time {text!r} is not ISO 8601") from None


def _from_pattern(form: str, zone: tzinfo, text: str) -> int:
    try:
        return epoch_ms(datetime.strptime(text, form), zone)
    except (ValueError, OverflowError):
        raise ValueError(f"time {text!r} does not have the form {form!r}") from None


def _from_number(per_second: int, value: Any) -> int:
    if isinstance(value, datetime):
        return epoch_ms(value)
    try:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        number = number if isinstance(number, int) else float(number)
        time = math.floor(number * 1_000 / per_second) if isinstance(number, float) else number * 1_000 // per_second
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"time {value!r} is not a finite number") from None
    if abs(time) > END_MS:
        raise ValueError(f"time {value!r} is beyond the year 9999: is log.time_format right?")
    return time


@lru_cache(4_096)
def access_log_minute_ms(minute: str, offset: str) -> int:
    """Epoch ms of `01/Jul/1995:04:00` and `+0000`; raises `ValueError`. A log asks for the same minute many times."""
    try:
        day, month, year = int(minute[:2]), MONTHS[minute[3:6]], int(minute[7:11])
        shift = (int(offset[1:3]) * 60 + int(offset[3:])) * (-1 if offset[0] == "-" else 1)
        time = datetime(year, month, day, int(minute[12:14]), int(minute[15:17]), tzinfo=UTC)
        return epoch_ms(time - timedelta(minutes=shift))
    except (KeyError, ValueError, OverflowError):
        raise ValueError(f"time {minute!r} is none") from None
