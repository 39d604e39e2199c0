"""What a predictor is asked, and what it answers."""

from collections.abc import Sequence

import msgspec

CONTEXT_TOKENS = 512


class Interest(msgspec.Struct, frozen=True):
    """What a visitor is after, in items, when a session closed.

    `seeds` are the seed events, heaviest channel first: item, global cluster, weight. `recent` are the items touched
    last, `bought` those just bought, both newest first; `session` those of the session that closed.
    """

    seeds: list[tuple[str, int, float]] = []
    recent: list[str] = []
    session: list[str] = []
    bought: list[str] = []


class Visit(msgspec.Struct, frozen=True):
    """A visitor at the moment a session closed.

    `seed` is the closed session's id: it fixes the sampled rollouts. `sessions` are page names, oldest first, the
    session that just closed last. `routing` are the router's running sums with that session included; None lets the
    bundle compute them from `sessions`. `interest` is what a retriever needs.
    """

    seed: str
    sessions: list[list[str]]
    routing: list[float] | None = None
    interest: Interest = Interest()


class Forecast(msgspec.Struct):
    """What the next session should look like.

    `pages` is the expected set, most probable first, each page with the probability that the next session holds it;
    `path` is the most likely sequence. `cart` and `purchase` lie strictly between 0 and 1.
    """

    cluster: int | None
    pages: list[tuple[str, float]]
    path: list[str]
    cart: float
    purchase: float


def recent(sessions: Sequence[Sequence[str]], tokens: int = CONTEXT_TOKENS) -> list[list[str]]:
    """The newest pages of `sessions` that fit into `tokens`, oldest first; a session of n pages takes n + 2 tokens.

    The oldest session that still fits in part keeps its newest pages. Cutting after every session gives the same as
    cutting once at the end, so a running state and a batch agree.
    """
    kept: list[list[str]] = []
    for session in reversed(sessions):
        room = tokens - 2
        if room < 1:
            break
        pages = list(session[-room:])
        if pages:
            kept.append(pages)
            tokens -= len(pages) + 2
        if len(pages) < len(session):
            break
    kept.reverse()
    return kept
