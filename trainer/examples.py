"""What is predicted from what: a user's session as the target, and only the sessions before it as the input."""

from collections.abc import Iterable
from dataclasses import dataclass

from models.routing import Router
from models.visit import CONTEXT_TOKENS, Visit, recent
from trainer.corpus import Corpus


@dataclass(frozen=True)
class Example:
    """A visit as the live predictor would see it when the session before the target closed, and what came."""

    user_id: str
    session_id: str  # of the target
    visit: Visit
    target: list[str]
    cart: bool
    purchase: bool
    cart_flags: list[float]  # of the input sessions, oldest first
    purchase_flags: list[float]


def examples(corpus: Corpus, users: Iterable[int], router: Router | None, targets: int = 1) -> list[Example]:
    """Each user's last `targets` sessions that have a session before them; without a router there are no sums."""
    return [_example(corpus, user, target, router) for user in users for target in corpus.sessions(user)[1:][-targets:]]


def _example(corpus: Corpus, user: int, target: int, router: Router | None) -> Example:
    inputs = range(corpus.sessions(user).start, target)
    history = [corpus.page_names(session) for session in inputs]
    return Example(
        user_id=corpus.users[user],
        session_id=corpus.session_ids[target],
        # As in the stream: routing sums over the whole history, pages of the recent past, the closed session's id.
        visit=Visit(
            corpus.session_ids[target - 1],
            recent(history, CONTEXT_TOKENS),
            None if router is None else router.route(history),
        ),
        target=corpus.page_names(target),
        cart=bool(corpus.cart[target]),
        purchase=bool(corpus.purchase[target]),
        cart_flags=corpus.cart[inputs.start : target].astype(float).tolist(),
        purchase_flags=corpus.purchase[inputs.start : target].astype(float).tolist(),
    )
