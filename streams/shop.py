"""The demo's shop: clicks of made-up visitors who have habits, so that there is something to learn.

The shop has pages for everybody (home, search, sale, new arrivals, reviews, wish list, account, orders, help, cart,
checkout, purchase complete), 8 categories and 6 products in each. `cart` has type cart, `purchase complete` type
purchase. Visitors are of five kinds, which no event tells:

    kind              share  what a visitor does, visit by visit
    bargain hunter     25 %  looks through the sale, in one favourite category and then the other, by turns; buys the
                             third time
    researcher         20 %  explores a category, then compares its products, then buys; then the shop's next category
    quick buyer        15 %  searches and buys; comes back to see where the order is
    window shopper     25 %  new arrivals, then one category further each visit; never buys
    subscriber         15 %  buys the same product again; in between only looks at the account

A kind is a ring of visits, each a Markov chain over groups of pages; after a visit the next of the ring follows, but
one in ten times the same once more. `{category}` is the page of the visitor's category of the day, `{product}` one of
two products liked there (out of the three that suit the kind's purse), `{any}` any product there. Kind, categories,
likings and rhythm (hours between visits, log normal around the kind's median) stay with a visitor. So the next session
differs from the last one in a way that the sessions before it tell, and kinds differ in what is probable next: a model
can beat "the last session again".

The same arguments give the same events, everywhere.
"""

import heapq
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from streams.settings import DAY_MS, HOUR_MS
from streams.wire import Event

CATEGORIES = ("books", "garden", "kitchen", "lamps", "music", "shoes", "toys", "travel")
PRODUCTS = 6  # in each category
TYPES = {"cart": "cart", "purchase complete": "purchase"}
REPEAT = 0.1  # a visit of the same sort once more
LEAST_REST_MS = 2 * HOUR_MS
LONGEST_PAUSE_MS = 10 * 60_000  # well under the session gap
MOST_CLICKS = 25
END = ""

Chain = dict[str, dict[str, float]]  # group -> group that follows -> weight; START begins, END ends
START = "start"

BUYING: Chain = {
    "cart": {"checkout": 9, END: 1},
    "checkout": {"purchase complete": 1},
    "purchase complete": {END: 1},
}
SALE: Chain = {
    START: {"sale": 9, "home": 1},
    "home": {"sale": 1},
    "sale": {"{category}": 1},
    "{category}": {"{product}": 1},
    "{product}": {"{product}": 5, "sale": 1, END: 4},
}
SALE_BUY: Chain = SALE | BUYING | {"{product}": {"{product}": 3, "cart": 7}}
EXPLORE: Chain = {
    START: {"home": 8, "search": 2},
    "home": {"{category}": 1},
    "search": {"{category}": 1},
    "{category}": {"{product}": 8, "{any}": 2},
    "{product}": {"{product}": 4, "{any}": 1, "{category}": 2, END: 3},
    "{any}": {"{product}": 3, END: 1},
}
COMPARE: Chain = {
    START: {"{product}": 1},
    "{product}": {"reviews": 6, "{product}": 2, "wish list": 2},
    "reviews": {"{product}": 4, "wish list": 4, END: 2},
    "wish list": {END: 1},
}
DECIDE: Chain = BUYING | {
    START: {"wish list": 9, "home": 1},
    "home": {"wish list": 1},
    "wish list": {"{product}": 1},
    "{product}": {"cart": 9, "reviews": 1},
    "reviews": {"cart": 1},
}
SEARCH_BUY: Chain = BUYING | {
    START: {"search": 1},
    "search": {"{product}": 9, "{any}": 1},
    "{product}": {"cart": 8, "{product}": 2},
    "{any}": {"search": 1},
}
TRACK: Chain = {
    START: {"account": 1},
    "account": {"orders": 1},
    "orders": {"help": 3, END: 7},
    "help": {END: 1},
}
STROLL: Chain = {
    START: {"home": 8, "new arrivals": 2},
    "home": {"new arrivals": 1},
    "new arrivals": {"{category}": 1},
    "{category}": {"{any}": 4, "{product}": 4, END: 2},
    "{any}": {"{category}": 3, END: 7},
    "{product}": {"{category}": 3, END: 7},
}
REORDER: Chain = BUYING | {
    START: {"account": 1},
    "account": {"orders": 1},
    "orders": {"{product}": 1},
    "{product}": {"cart": 1},
}
LOOK: Chain = {START: {"account": 1}, "account": {"help": 3, "orders": 2, END: 5}, "help": {END: 1}, "orders": {END: 1}}


class Kind(NamedTuple):
    """Visitors alike. A visit of the ring is its chain and how many categories further it goes than the one before."""

    share: int
    rest_hours: float  # median between visits
    categories: int  # favourites, taken by turns
    purse: range  # products that suit it, in every category
    ring: tuple[tuple[Chain, int], ...]


KINDS = {
    "bargain hunter": Kind(25, 26, 2, range(1, 4), ((SALE, 1), (SALE, 1), (SALE_BUY, 1))),
    "researcher": Kind(20, 20, len(CATEGORIES), range(4, 7), ((EXPLORE, 1), (COMPARE, 0), (DECIDE, 0))),
    "quick buyer": Kind(15, 40, 2, range(2, 5), ((SEARCH_BUY, 1), (TRACK, 0))),
    "window shopper": Kind(25, 30, len(CATEGORIES), range(3, 6), ((STROLL, 1),)),
    "subscriber": Kind(15, 48, 1, range(1, 4), ((REORDER, 0), (LOOK, 0), (LOOK, 0))),
}


def shop_events(visitors: int, days: float, seed: int, start_ms: int) -> Iterator[Event]:
    """Clicks of `visitors` visitors within `days` days from `start_ms` (epoch ms, UTC), in order of time.

    A visitor has about 4 to 12 visits in 14 days, of about 5 clicks each. Memory grows with the visitors, not the days.
    """
    ways = (_visitor_events(number, days, seed, start_ms) for number in range(visitors))
    return heapq.merge(*ways, key=lambda event: (event.ts, event.user_id))


def kind_of(visitor: int, seed: int) -> str:
    """The kind of a visitor; for tests and for whoever wants to see whether clusters find it."""
    return _chosen(Random(f"{seed}:{visitor}:kind"), {name: kind.share for name, kind in KINDS.items()})


def _visitor_events(number: int, days: float, seed: int, start_ms: int) -> Iterator[Event]:
    random = Random(f"{seed}:{number}")
    kind = KINDS[kind_of(number, seed)]
    user = f"visitor-{seed}-{number:05d}"
    device = random.choice(("mobile", "desktop"))
    favourites = _favourites(random, kind)
    liked = {category: random.sample(kind.purse, 2) for category in favourites}
    end_ms = start_ms + int(days * DAY_MS)
    ts = start_ms + int(random.random() * 0.3 * days * DAY_MS)
    visit, turn, clicks = random.randrange(len(kind.ring)), random.randrange(len(favourites)), 0
    while ts < end_ms:
        chain = kind.ring[visit][0]
        category = favourites[turn]
        for page, item in _visit(random, chain, category, liked[category]):
            if ts >= end_ms:
                return
            yield _click(user, clicks, ts, page, item, category, device)
            clicks += 1
            ts += min(int(random.lognormvariate(3.6, 0.8) * 1_000) + 1_000, LONGEST_PAUSE_MS)  # median 37 s
        ts += max(int(random.lognormvariate(0, 0.5) * kind.rest_hours * HOUR_MS), LEAST_REST_MS)
        if random.random() >= REPEAT:
            visit = (visit + 1) % len(kind.ring)
            turn = (turn + kind.ring[visit][1]) % len(favourites)


def _favourites(random: Random, kind: Kind) -> list[str]:
    """The visitor's categories in the order of their turns; who visits all goes through the shop's own order."""
    if kind.categories == len(CATEGORIES):
        return list(CATEGORIES)
    return random.sample(CATEGORIES, kind.categories)


def _visit(random: Random, chain: Chain, category: str, liked: list[int]) -> Iterator[tuple[str, int | None]]:
    """Pages of one visit, and the number of the product where the page is one."""
    group, seen = START, -1
    for _ in range(MOST_CLICKS):
        group = _chosen(random, chain[group])
        if group == END:
            return
        if group in ("{product}", "{any}"):
            choice = liked if group == "{product}" else range(1, PRODUCTS + 1)
            seen = random.choice([product for product in choice if product != seen])
            yield f"{category} {seen}", seen
        else:
            yield (category if group == "{category}" else group), None


def _click(user: str, number: int, ts: int, page: str, item: int | None, category: str, device: str) -> Event:
    about = category if item is not None or page == category else None
    return Event(
        user_id=user,
        ts=ts,
        page=page,
        event_id=f"{user}-{number}",
        type=TYPES.get(page, "view"),
        item_id=None if item is None else f"{category}-{item}",
        price=None if item is None else _price(category, item),
        category=about,
        query=category if page == "search" else None,
        device=device,
    )


def _price(category: str, item: int) -> float:
    return round(4.9 + 7 * CATEGORIES.index(category) + 3.5 * item, 2)


def _chosen(random: Random, weights: dict[str, float] | dict[str, int]) -> str:
    return random.choices(list(weights), list(weights.values()))[0]
