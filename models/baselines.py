"""Predictions that need no model: the bar that every model is shown beside."""

from collections import Counter
from collections.abc import Sequence

from models.visit import Forecast, Visit

MAX_PATH = 32
OWN_PAGES = 7  # best size of an own-frequency set on simulated shops (hetlm_findings, section 3)


def last_session(visit: Visit, cart: float = 0.5, purchase: float = 0.5) -> Forecast:
    """The last session again: its pages, each with the share of the visitor's sessions that hold it."""
    last = visit.sessions[-1] if visit.sessions else []
    share = page_shares(visit.sessions)
    pages = sorted(dict.fromkeys(last), key=lambda page: -share[page])
    return Forecast(None, [(page, share[page]) for page in pages], list(last[:MAX_PATH]), cart, purchase)


def own_frequencies(visit: Visit, size: int = OWN_PAGES, cart: float = 0.5, purchase: float = 0.5) -> Forecast:
    """The pages that this visitor sees most, by the share of sessions that hold them; newest first among equals."""
    share = page_shares(visit.sessions)
    newest = dict.fromkeys(page for session in reversed(visit.sessions) for page in session)
    pages = sorted(newest, key=lambda page: -share[page])[:size]
    return Forecast(None, [(page, share[page]) for page in pages], pages[:MAX_PATH], cart, purchase)


def own_rate(flags: Sequence[float], base: float, weight: float = 4.0) -> float:
    """Share of a visitor's sessions with an outcome, shrunk to the `base` rate as if seen in `weight` more sessions."""
    return (sum(flags) + weight * base) / (len(flags) + weight)


def page_shares(sessions: Sequence[Sequence[str]]) -> dict[str, float]:
    """For each page the share of the sessions that hold it, in (0, 1]."""
    counts = Counter(page for session in sessions for page in set(session))
    return {page: count / len(sessions) for page, count in counts.items()}
