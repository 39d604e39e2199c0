"""Our predictions beside two baselines, on exactly the same pairs of a visitor's history and the session that came."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from models import baselines, metrics
from models.visit import Forecast, Visit
from streams.wire import Score, Session

OURS = "Browsecast"
LAST = "the last session again"
OWN = "the pages this visitor sees most"
PREDICTORS = (OURS, LAST, OWN)


@dataclass(slots=True)
class Means:
    """Sums over pairs; log losses in nats."""

    pairs: int = 0
    hit_rate: float = 0.0
    iou: float = 0.0
    cart_log_loss: float = 0.0
    purchase_log_loss: float = 0.0

    def add(self, hit: int, iou: float, cart_log_loss: float, purchase_log_loss: float) -> None:
        """Take one pair in."""
        self.pairs += 1
        self.hit_rate += hit
        self.iou += iou
        self.cart_log_loss += cart_log_loss
        self.purchase_log_loss += purchase_log_loss

    def figures(self) -> tuple[float, float, float, float]:
        """Mean hit rate, IoU, cart and purchase log loss; zeros before the first pair."""
        pairs = max(self.pairs, 1)
        return self.hit_rate / pairs, self.iou / pairs, self.cart_log_loss / pairs, self.purchase_log_loss / pairs


@dataclass(frozen=True, slots=True)
class Rates:
    """Share of past sessions with a cart and with a purchase."""

    cart: float
    purchase: float


@dataclass(slots=True)
class _Visitor:
    """Outcomes of a visitor's sessions so far, in order."""

    cart: list[float] = field(default_factory=list)
    purchase: list[float] = field(default_factory=list)


class Contest:
    """Feed it the topics `sessions` and `scores`, in any order between the two; `standings` has the means so far.

    rates: the outcome rates of the past, by source; source: which log a visitor comes from, by the user id.
    """

    def __init__(self, rates: Mapping[str, Rates], source: Callable[[str], str]) -> None:
        self.standings = {name: {predictor: Means() for predictor in PREDICTORS} for name in rates}
        self.sessions = 0
        self._rates, self._source = rates, source
        self._visitors: dict[str, _Visitor] = defaultdict(_Visitor)
        self._guesses: dict[str, tuple[Session, Forecast, Forecast]] = {}
        self._early: dict[str, Score] = {}

    def session(self, session: Session) -> None:
        """A session came: what would the baselines have said?"""
        self.sessions += 1
        visitor, rates = self._visitors[session.user_id], self._rates[self._source(session.user_id)]
        if session.context.history:
            visit = Visit(session.session_id, session.context.history)
            cart = baselines.own_rate(visitor.cart, rates.cart)
            purchase = baselines.own_rate(visitor.purchase, rates.purchase)
            last = baselines.last_session(visit, cart, purchase)
            own = baselines.own_frequencies(visit, cart=cart, purchase=purchase)
            self._guesses[session.session_id] = (session, last, own)
        visitor.cart.append(session.cart)
        visitor.purchase.append(session.purchase)
        early = self._early.pop(session.session_id, None)
        if early is not None:
            self.score(early)

    def score(self, score: Score) -> None:
        """A prediction was scored: score the baselines on the same session."""
        guess = self._guesses.pop(score.session_id, None)
        if guess is None:
            self._early[score.session_id] = score
            return
        session, last, own = guess
        standing = self.standings[self._source(score.user_id)]
        standing[OURS].add(score.hr, score.iou, score.cart_log_loss, score.purchase_log_loss)
        for name, forecast in ((LAST, last), (OWN, own)):
            pages = [page for page, _ in forecast.pages]
            standing[name].add(
                metrics.hr(session.pages, pages),
                metrics.iou(session.pages, pages),
                metrics.log_loss(forecast.cart, session.cart),
                metrics.log_loss(forecast.purchase, session.purchase),
            )

    def has_outcomes(self, source: str) -> bool:
        """Whether any past session of the source had a cart or a purchase."""
        return self._rates[source].cart + self._rates[source].purchase > 0

    @property
    def pairs(self) -> int:
        """Pairs scored so far."""
        return sum(standing[OURS].pairs for standing in self.standings.values())
