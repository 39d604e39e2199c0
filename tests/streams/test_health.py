import json
import urllib.error
import urllib.request
from asyncio import to_thread

import pytest

from streams.errors import UsageError
from streams.health import Health
from streams.metrics import Metrics
from streams.settings import Settings


def fetch(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_ready_says_why_not_and_live_and_metrics_answer() -> None:
    reasons = {"sessionize": "partition 3 is being restored"}
    metrics = Metrics()
    metrics.received.labels(0).inc(5)
    health = Health(Settings(port=0), metrics, ready=lambda: reasons)
    port = await health.start()
    try:
        status, body = await to_thread(fetch, port, "/ready")
        assert (status, json.loads(body)) == (503, {"ready": False, "reasons": reasons})
        reasons.clear()
        status, body = await to_thread(fetch, port, "/ready")
        assert (status, json.loads(body)["ready"]) == (200, True)
        status, body = await to_thread(fetch, port, "/live")
        assert (status, json.loads(body)) == (200, {"live": True, "reason": None})
        status, body = await to_thread(fetch, port, "/metrics")
        assert status == 200
        assert 'browsecast_received_events_total{partition="0"} 5.0' in body
    finally:
        await health.stop()


async def test_a_worker_that_should_be_restarted_is_not_live() -> None:
    health = Health(Settings(port=0), Metrics(), ready=dict, live=lambda: "no progress for 61 s")
    port = await health.start()
    try:
        status, body = await to_thread(fetch, port, "/live")
        assert (status, json.loads(body)["reason"]) == (503, "no progress for 61 s")
    finally:
        await health.stop()


async def test_a_port_in_use_is_named_with_its_remedy() -> None:
    first = Health(Settings(port=0), Metrics(), ready=dict)
    port = await first.start()
    try:
        with pytest.raises(UsageError, match=rf"127\.0\.0\.1:{port}.*--port"):
            await Health(Settings(port=port), Metrics(), ready=dict).start()
    finally:
        await first.stop()
