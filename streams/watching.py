"""Predictions and scores as they come: the running figures behind `browsecast watch`."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from streams import tail, wire
from streams.settings import Settings

ROWS = 12
_prediction = msgspec.json.Decoder(wire.Prediction).decode
_score = msgspec.json.Decoder(wire.Score).decode

Record = wire.Prediction | wire.Score


@dataclass(slots=True)
class Running:
    """Means over all scores seen. Log losses in nats."""

    scores: int = 0
    hits: int = 0
    iou: float = 0.0
    cart_log_loss: float = 0.0
    purchase_log_loss: float = 0.0

    def add(self, score: wire.Score) -> None:
        """Take one score in."""
        self.scores += 1
        self.hits += score.hr
        self.iou += score.iou
        self.cart_log_loss += score.cart_log_loss
        self.purchase_log_loss += score.purchase_log_loss

    def means(self) -> dict[str, float]:
        """hit rate, overlap and log losses; empty before the first score."""
        if not self.scores:
            return {}
        sums = {
            "hit rate": float(self.hits),
            "IoU": self.iou,
            "cart log loss": self.cart_log_loss,
            "purchase log loss": self.purchase_log_loss,
        }
        return {name: value / self.scores for name, value in sums.items()}


@dataclass(slots=True)
class Watch:
    """What was seen so far: counts, running means and the last rows."""

    predictions: int = 0
    fallbacks: int = 0
    forgotten: int = 0
    running: Running = field(default_factory=Running)
    rows: deque[Record] = field(default_factory=lambda: deque(maxlen=ROWS))

    @property
    def records(self) -> int:
        """Predictions and scores together."""
        return self.predictions + self.running.scores

    def add(self, record: Record) -> None:
        """Take one record in."""
        self.rows.append(record)
        if isinstance(record, wire.Score):
            self.running.add(record)
        else:
            self.predictions += 1
            self.fallbacks += record.fallback is not None


def watch(
    settings: Settings, *, from_beginning: bool = False, count: int | None = None
) -> Iterator[tuple[Watch, Record | None]]:
    """Each prediction and score as it comes, with everything so far; None when nothing came for a moment.

    Ends after `count` records; without it, never.
    """
    seen = Watch()
    scores = settings.topic(wire.SCORES)
    topics = [settings.topic(wire.PREDICTIONS), scores]
    for message in tail.follow(settings, topics, from_beginning=from_beginning):
        record: Record | None = None
        if message is not None and message.value() is None:
            seen.forgotten += 1
        elif message is not None:
            record = _score(message.value()) if message.topic() == scores else _prediction(message.value())
            seen.add(record)
        yield seen, record
        if count is not None and seen.records >= count:
            return


def describe(record: Record) -> tuple[str, str, str, str, str]:
    """(kind, user, pages, cart, purchase) in a few words."""
    if isinstance(record, wire.Score):
        pages = f"{'hit' if record.hr else 'miss'}  IoU {record.iou:.2f}"
        cart = f"{record.cart_p:.2f} -> {'yes' if record.cart else 'no'}"
        return "score", record.user_id, pages, cart, f"{record.purchase_p:.2f} -> {'yes' if record.purchase else 'no'}"
    pages = "  ".join(f"{item.page} {item.p:.2f}" for item in record.pages[:4])
    model = f"fallback: {record.fallback}" if record.fallback else f"cluster {record.cluster}"
    return "prediction", record.user_id, f"{pages}  ({model})", f"{record.cart:.2f}", f"{record.purchase:.2f}"
