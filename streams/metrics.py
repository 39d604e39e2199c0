"""Every figure that a worker shows to Prometheus, in one place, with its unit in its name."""

from collections import defaultdict
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from streams.itemfigures import Figures

FATES = ("accepted", "duplicate", "late", "rejected")
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
RESTORE_BUCKETS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0)
MILLISECONDS_BUCKETS = (1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 75.0, 100.0, 150.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 6e4)


@dataclass(slots=True)
class _Running:
    """Sums over all scores of one model."""

    scores: int = 0
    hits: int = 0


class Metrics:
    """All metrics of one worker in a registry of their own, so that several workers fit in one process (tests).

    Labels are given in the order that is written at each metric. `held_events` is a gauge because a held event gets
    its final fate later; thus at any time, per partition:
    received = accepted + duplicate + late + rejected + held.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._running: dict[str, _Running] = defaultdict(_Running)
        ProcessCollector(registry=self.registry)
        self._input()
        self._state()
        self._models()
        self._items()

    def _input(self) -> None:
        partition = ("partition",)
        self.lag = self._gauge("lag_records", "records not read yet", "role", "topic", "partition")
        self.watermark = self._gauge("watermark_timestamp_seconds", "event time reached, epoch seconds", *partition)
        self.received = self._counter("received_events", "events read from clicks", *partition)
        self.events = self._counter("events", "events by what became of them: " + ", ".join(FATES), "partition", "fate")
        self.held_events = self._gauge("held_events", "events held because they are ahead of the watermark", *partition)
        self.rejected = self._counter("rejected_events", "rejected events by reason", "partition", "reason")
        self.forgotten = self._counter("forgotten_users", "users forgotten by a null value", *partition)
        self.expired_users = self._counter("expired_users", "users forgotten after long silence", *partition)
        self.capped_users = self._counter("capped_users", "users who began to exceed the rate limit", *partition)

    def _state(self) -> None:
        self.open_sessions = self._gauge("open_sessions", "sessions not closed yet", "partition")
        self.cached_users = self._gauge("cached_users", "decoded users kept in memory", "partition")
        self.sessions_closed = self._counter("sessions_closed", "sessions published", "partition")
        self.flush_seconds = self._histogram("flush_seconds", "one transaction and its write", SECONDS_BUCKETS, "role")
        self.flushed_records = self._counter("flushed_records", "records in committed transactions", "role")
        self.restore_seconds = self._histogram("restore_seconds", "rebuilding one partition", RESTORE_BUCKETS, "role")
        self.restored_records = self._counter("restored_records", "changelog records read to rebuild state", "role")
        self.stalled_seconds = self._gauge("stalled_seconds", "time with lag and without progress", "role")

    def _models(self) -> None:
        self.model_loaded = self._gauge("model_loaded", "1 for the bundle in use", "model", "digest")
        self.challenger_loaded = self._gauge("challenger_loaded", "1 for the bundle in shadow", "model", "digest")
        self.models_refused = self._counter(
            "models_refused", "times that a bundle could not serve though an alias names it", "alias"
        )
        for alias in ("champion", "challenger"):  # so that the first time is seen as a rise
            self.models_refused.labels(alias)
        self.model_swaps = self._counter("model_swaps", "champions that took over while the worker ran")
        self.model_swap_seconds = self._histogram(
            "model_swap_seconds", "from a champion's name to its first turn: fetch, verify, load, warm", RESTORE_BUCKETS
        )
        self.shadow_predictions = self._counter(
            "shadow_predictions", "sessions the challenger was asked for: made, late, busy, failed", "outcome"
        )
        self.predictions = self._counter("predictions", "predictions by model and fallback reason", "model", "fallback")
        self.batch_sessions = self._histogram(
            "batch_sessions", "sessions in a micro-batch", (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
        )
        self.batch_seconds = self._histogram("batch_seconds", "one micro-batch in the model", SECONDS_BUCKETS)
        self.model_failures = self._counter("model_failures", "failures of the model by kind", "kind")
        self.close_to_prediction = self._histogram(
            "close_to_prediction_milliseconds", "from the close of a session to its prediction", MILLISECONDS_BUCKETS
        )
        self.scores = self._counter("scores", "scored predictions", "model")
        self.hits = self._counter("score_hits", "scored predictions with a page in common", "model")
        self.hit_ratio = self._gauge("score_hit_ratio", "hits over scores since the start", "model")
        self.log_loss = self._counter("score_log_loss_nats", "sum of log losses by outcome", "model", "outcome")
        self.predictions_expired = self._counter("predictions_expired", "predictions whose session never came")
        self.waiting_predictions = self._gauge(
            "waiting_predictions", "predictions that wait for their session", "partition"
        )

    def _items(self) -> None:
        self.catalogue_items = self._gauge("catalogue_items", "items known: available, unavailable", "state")
        self.popularity_clicks = self._gauge("popularity_clicks", "clicks in the window that popularity counts")
        self.rejected_items = self._gauge("rejected_item_records", "records of the topic items that cannot be read")
        self.waiting_texts = self._gauge("waiting_item_texts", "new items that wait for a vector from their text")

    def show_items(self, figures: Figures | None) -> None:
        """As the model's process tells it; None for a model that knows no items."""
        if figures is not None:
            self.catalogue_items.labels("available").set(figures.available)
            self.catalogue_items.labels("unavailable").set(figures.known - figures.available)
            self.popularity_clicks.set(figures.clicks)
            self.rejected_items.set(figures.rejected)
            self.waiting_texts.set(figures.waiting)

    def count(self, partition: int, fate: str, events: int = 1, reason: str | None = None) -> None:
        """Count events that met their final fate (one of FATES); a rejected one also by its reason."""
        self.events.labels(partition, fate).inc(events)
        if reason is not None:
            self.rejected.labels(partition, reason).inc(events)

    def scored(self, model: str, hit: int, cart_log_loss: float, purchase_log_loss: float) -> None:
        """Count one score (log losses in nats) and move the model's running hit rate."""
        running = self._running[model]
        running.scores += 1
        running.hits += hit
        self.scores.labels(model).inc()
        self.hits.labels(model).inc(hit)
        self.log_loss.labels(model, "cart").inc(cart_log_loss)
        self.log_loss.labels(model, "purchase").inc(purchase_log_loss)
        self.hit_ratio.labels(model).set(running.hits / running.scores)

    def drop_partition(self, role: str, topic: str, partition: int) -> None:
        """A partition was taken away: its figures, which are part of its state, are another worker's now."""
        self._remove(self.lag, role, topic, str(partition))
        if role == "score":
            self._remove(self.waiting_predictions, str(partition))
        if role == "sessionize":
            for metric in (self.watermark, self.held_events, self.open_sessions, self.cached_users, self.received):
                self._remove(metric, str(partition))
            for fate in FATES:
                self._remove(self.events, str(partition), fate)

    def render(self) -> bytes:
        """The page that Prometheus scrapes, in its text format."""
        return generate_latest(self.registry)

    @staticmethod
    def _remove(metric: Gauge | Counter, *labels: str) -> None:
        metric.labels(*labels)  # remove() raises for labels that were never set
        metric.remove(*labels)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="browsecast", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="browsecast", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="browsecast", buckets=buckets, registry=self.registry)
