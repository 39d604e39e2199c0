"""The demo's logs: what is learned from, what is played, and the shop's new addresses on the way.

In the middle of what is played the made-up shop moves its catalogue and checkout to new addresses (`books 3` becomes
`shop/books/3`), as shops do. No model has seen these pages, so predictions get worse until one has learned them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from streams.lines import BadLine
from streams.profiles import SiteProfile
from streams.readers import nasa_excerpt, read_log
from streams.settings import DAY_MS, HOUR_MS
from streams.shop import CATEGORIES, shop_events
from streams.wire import Event

SHOP, NASA = "demo shop", "NASA 1995"
SHOP_START_MS = 805_000_000_000  # 6 July 1995, after the excerpt of NASA's log, so that one worker can play both
NASA_PAST_MS = HOUR_MS
SEED = 1
MOVING = {*CATEGORIES, "wish", "cart", "checkout", "purchase"}  # first words of pages
# Days since the shop's start: up to PAST to learn from; from MOVED on at new addresses; SEEN by the trainer before its
# refresh; TRIED with a challenger beside the champion, if need be as long as to the last of these days.
SHOP_DAYS, PAST, MOVED, SEEN, TRIED = 28.0, 14.0, 17.0, 21.5, (23.5, 24.5, 25.5)


@dataclass(frozen=True, slots=True)
class Log:
    """A log in two parts: what the model is trained on, and what is played."""

    name: str
    past: list[Event]
    rest: list[Event]


def logs(visitors: int) -> Iterator[Log]:
    """NASA's access log and the made-up shop, each split at a moment."""
    profile = SiteProfile.load("nasa")
    with nasa_excerpt() as path:
        hits = [event for event in read_log(path, profile) if not isinstance(event, BadLine)]
    yield _split(NASA, hits, hits[0].ts + NASA_PAST_MS)
    clicks = [moved(event) for event in shop_events(visitors, SHOP_DAYS, SEED, SHOP_START_MS)]
    yield _split(SHOP, clicks, at_day(PAST))


def at_day(day: float) -> int:
    """A moment of the shop, epoch ms."""
    return SHOP_START_MS + int(day * DAY_MS)


def source(user_id: str) -> str:
    """Which log a visitor comes from."""
    return SHOP if user_id.startswith("visitor-") else NASA


def moved(event: Event) -> Event:
    """The event with the address that its page has at that time."""
    words = event.page.split()
    if event.ts < at_day(MOVED) or words[0] not in MOVING:
        return event
    return msgspec.structs.replace(event, page="/".join(["shop", *words]))


def _split(name: str, events: list[Event], moment_ms: int) -> Log:
    return Log(name, [e for e in events if e.ts < moment_ms], [e for e in events if e.ts >= moment_ms])
