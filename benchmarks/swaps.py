"""Champions that follow each other under load: part of `benchmarks.refresh`."""

import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.broker import deployment
from benchmarks.latency import percentiles
from benchmarks.load import scratch
from benchmarks.stopwatch import Stopwatch, Timed
from models.bundle import load_bundle, use_threads
from streams.settings import Settings
from tests.play import metric
from tests.swapping import name, variant
from tests.workers import Worker

PARTITIONS = 4
GAP_MS, GRACE_MS = 60_000, 10_000  # of event time: so that sessions close soon after the run begins
USERS = 20_000
WARM_S = 10.0
STEP_S = 4.0  # of load in one go
AFTER_S, TURN_S = 2.0, 0.2


@contextmanager
def worker(settings: Settings, directory: Path, roles: Sequence[str]) -> Iterator[Worker]:
    """A worker that is ready."""
    process = Worker(settings, directory, roles)
    try:
        process.start()
        process.wait_ready(300)
        yield process
    finally:
        process.stop()


class Swap(NamedTuple):
    """When the alias moved, and when the first prediction by the new champion was seen (epoch seconds)."""

    named: float
    served: float


def swaps(servers: str, bundle: Path, rate: float, count: int) -> dict[str, Any]:
    """Champions that follow each other under load."""
    with scratch() as place, tempfile.TemporaryDirectory() as other:
        directory = Path(place)
        bundles = [variant(bundle, Path(other) / f"v{number}", f"variant {number}") for number in range(2)]
        settings = deployment(
            servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS, bundle=bundles[0]
        )
        with worker(settings, directory / "w", ("sessionize", "predict", "score")) as running:
            watch = Stopwatch(settings, USERS)
            watch.run(rate, 2 * WARM_S)
            calm = time.time()
            for _ in range(count * 2):
                watch.run(rate, STEP_S)
            named, began = list[float](), time.time()
            mover = threading.Thread(target=_move, args=(settings, running, bundles, count, named))
            mover.start()
            while mover.is_alive():
                watch.run(rate, STEP_S)
            watch.linger(3)
            taken = metric(running, "browsecast_model_swaps_total")
            seconds = metric(running, "browsecast_model_swap_seconds_sum") / max(taken, 1)
        seen = watch.since(calm)
    quiet, busy = [one for one in seen if one.at < began], [one for one in seen if one.at >= began]
    turns = _turns(busy, named)
    return {
        "swaps": int(taken), "predictions": len(seen), "seconds": round(seconds, 2),
        "named_to_served_s": [round(one.served - one.named, 2) for one in turns],
        "longest_gap_ms": round(max(_gap(busy, one.named, one.served + AFTER_S) for one in turns), 1),
        "longest_gap_without_ms": round(_gap(quiet, calm, began), 1),
        "turn_gap_ms": [round(_gap(busy, one.served - TURN_S, one.served + TURN_S), 1) for one in turns],
        "close_to_prediction_ms": {"without": _times(quiet), "with": _times(busy)},
        "fallbacks": sum(one.prediction.fallback is not None for one in seen),
        "bare_load_s": _bare_load(bundle),
    }  # fmt: skip


def _move(settings: Settings, running: Worker, bundles: Sequence[Path], count: int, named: list[float]) -> None:
    """Name one champion after the other, each a while after the one before has taken over."""
    for number in range(1, count + 1):
        named.append(time.time())
        name(settings, "champion", bundles[number % 2])
        while metric(running, "browsecast_model_swaps_total") < number:
            time.sleep(0.2)
        time.sleep(2 * AFTER_S)


def _turns(seen: Sequence[Timed], named: Sequence[float]) -> list[Swap]:
    """Of each move, the first prediction by another digest than the one before it."""
    found = []
    for at, until in zip(named, [*named[1:], float("inf")], strict=True):
        before = [one for one in seen if one.at < at][-1:] or seen[:1]
        after = (one.at for one in seen if at <= one.at < until and _digest(one) != _digest(before[0]))
        served = next(after, None)
        if served is not None:
            found.append(Swap(at, served))
    if not found:
        raise RuntimeError("no champion took over: is the load so high that a model cannot be loaded in its time?")
    return found


def _digest(one: Timed) -> str:
    return one.prediction.model_digest


def _gap(seen: Sequence[Timed], start: float, end: float) -> float:
    """Longest time without a prediction, milliseconds."""
    times = [start, *(one.at for one in seen if start <= one.at <= end), end]
    return max(1000 * (b - a) for a, b in pairwise(times))


def _times(seen: Sequence[Timed]) -> dict[str, float]:
    return percentiles([one.after_ms for one in seen if one.after_ms is not None])


def _bare_load(bundle: Path) -> float:
    use_threads(1)
    began = time.perf_counter()
    load_bundle(bundle, "cpu")
    return round(time.perf_counter() - began, 3)
