from streams.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"browsecast_{name}", labels)


def test_a_rejected_event_counts_by_fate_and_by_reason() -> None:
    metrics = Metrics()
    metrics.count(3, "rejected", 2, "invalid_json")
    metrics.count(3, "accepted")
    assert value(metrics, "events_total", partition="3", fate="rejected") == 2
    assert value(metrics, "events_total", partition="3", fate="accepted") == 1
    assert value(metrics, "rejected_events_total", partition="3", reason="invalid_json") == 2


def test_the_running_hit_rate_is_hits_over_scores_of_each_model() -> None:
    metrics = Metrics()
    for hit in (1, 0, 0, 1):
        metrics.scored("v1", hit, 0.5, 0.25)
    metrics.scored("v2", 1, 0.5, 0.25)
    assert value(metrics, "score_hit_ratio", model="v1") == 0.5
    assert value(metrics, "score_hit_ratio", model="v2") == 1.0
    assert value(metrics, "scores_total", model="v1") == 4
    assert value(metrics, "score_log_loss_nats_total", model="v1", outcome="cart") == 2.0


def test_a_revoked_partition_takes_the_figures_of_its_state_along() -> None:
    metrics = Metrics()
    metrics.lag.labels("sessionize", "clicks", 0).set(7)
    metrics.lag.labels("sessionize", "clicks", 1).set(8)
    metrics.watermark.labels(0).set(1.0)
    metrics.received.labels(0).inc(5)
    metrics.sessions_closed.labels(0).inc(2)
    metrics.drop_partition("sessionize", "clicks", 0)
    metrics.drop_partition("sessionize", "clicks", 2)
    assert value(metrics, "lag_records", role="sessionize", topic="clicks", partition="0") is None
    assert value(metrics, "lag_records", role="sessionize", topic="clicks", partition="1") == 8
    assert value(metrics, "watermark_timestamp_seconds", partition="0") is None
    assert value(metrics, "received_events_total", partition="0") is None
    assert value(metrics, "sessions_closed_total", partition="0") == 2


def test_two_workers_fit_in_one_process() -> None:
    first, second = Metrics(), Metrics()
    first.received.labels(0).inc()
    assert value(second, "received_events_total", partition="0") is None
