"""Every figure that a trainer shows to Prometheus, in one place, with its unit in its name."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

DECISIONS = ("published", "promoted", "retired", "rolled_back", "refused", "pruned")
RESULTS = ("published", "refused", "failed")
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
DELAY_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 300.0, 3_600.0, 86_400.0)


class TrainerMetrics:
    """All metrics of one trainer in a registry of their own. Labels are given in the order written at each metric."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.decisions = self._counter("decisions", "decisions about models by this trainer", "decision")
        for decision in DECISIONS:  # so that the first one is seen as a rise
            self.decisions.labels(decision)
        self._archiving()
        self._refreshing()
        self._judging()
        self._drifting()

    def _archiving(self) -> None:
        self.archived_sessions = self._gauge("archived_sessions", "sessions ever archived")
        self.archive_files = self._gauge("archive_files", "files of the archive")
        self.archive_bytes = self._gauge("archive_bytes", "size of these files")
        self.archive_commit = self._gauge("archive_commit", "number of the archive's last commit")
        self.archive_forgets = self._gauge("archive_forgets", "forgotten users who may still be in a file")
        self.archive_lag = self._gauge("archive_lag_records", "records of sessions not read yet", "partition")
        self.archive_unreadable = self._counter("archive_unreadable_records", "records of sessions that were none")
        self.archive_delay = self._histogram(
            "archive_delay_seconds", "from a session's close to its presence in the archive", DELAY_BUCKETS
        )
        self.archive_flush_seconds = self._histogram(
            "archive_flush_seconds", "one commit of new sessions: files and manifest", SECONDS_BUCKETS
        )

    def _refreshing(self) -> None:
        self.refreshes = self._counter("refreshes", "refreshes by result: " + ", ".join(RESULTS), "result")
        for result in RESULTS:
            self.refreshes.labels(result)
        self.refresh_seconds = self._gauge("refresh_seconds", "how long the last refresh took, from plan to decision")

    def _judging(self) -> None:
        self.judged_scores = self._counter("judged_scores", "scores read by the judge")
        self.challenger_sessions = self._gauge("challenger_sessions", "sessions compared of the present challenger")
        self.challenger_difference = self._gauge(
            "challenger_difference", "mean difference to the champion: iou, and Brier scores of the outcomes", "measure"
        )
        self.challenger_evidence = self._gauge(
            "challenger_evidence_nats", "log e-values: higher or lower IoU, outcomes harmless or worse", "claim"
        )
        self.fall_evidence = self._gauge(
            "champion_fall_evidence_nats", "log e-value against: the champion is never below a baseline"
        )
        self.below_baseline = self._gauge(
            "champion_below_baseline", "1: the champion was shown to be below the best baseline"
        )

    def _drifting(self) -> None:
        self.drift = self._gauge("drift", "how far the visitors are from those the champion was trained on", "kind")
        self.drift_limit = self._gauge("drift_limit", "more drift than this is worth an alert", "kind")

    def show_drift(self, figures: Mapping[str, float], limits: Mapping[str, float]) -> None:
        """Figures by kind; a kind without a figure is not shown."""
        self.drift.clear()
        for kind, figure in figures.items():
            self.drift.labels(kind).set(figure)
        for kind, limit in limits.items():
            self.drift_limit.labels(kind).set(limit)

    def render(self) -> bytes:
        """The page that Prometheus scrapes, in its text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, namespace="browsecast", registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="browsecast", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="browsecast", buckets=buckets, registry=self.registry)
