"""From the close of a session to its published prediction, both transactions included, at half load.

`python -m benchmarks.latency --bundle DIR`. A worker with all roles gets a steady stream of clicks. An outside consumer
that reads committed takes the time of each prediction (`benchmarks.stopwatch`), so the figure holds everything that a
shop waits for. `close_to_emit_ms` is the worker's own. Without `--rate` the load is half of the clicks a second that
the same worker sustains: the rate rises step by step until predictions come later and later.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from aiokafka import AIOKafkaProducer

from benchmarks.broker import broker, deployment, parser
from benchmarks.load import cpu_seconds, scratch
from benchmarks.stopwatch import Stopwatch
from models.visit import Visit
from streams import ownership, tail
from streams.settings import Settings
from streams.wire import PREDICTIONS, SESSIONS, Session
from tests.bundle import make_bundle
from tests.kafka import LASTING
from tests.play import metric
from tests.workers import Worker, children, models

PARTITIONS = 4
GAP_MS, GRACE_MS = 60_000, 10_000  # of event time: so that sessions close soon after the run begins
ROLES = ("sessionize", "predict", "score")
WARM_S = 60.0  # before anything is measured: the broker's compiler takes so long to optimise what it does
FIRST_RATE, RATE_STEP, RATE_S, RATE_LIMIT = 800.0, 1.25, 10.0, 20_000.0
SUSTAINED_MS = 500.0  # the last predictions of a step come no later than this, else work piles up
PACE = 0.98  # share of a step's clicks that the broker must take in its time
MODEL_AIM_S = "0.025"
Fleet = dict[str, Worker]  # role -> the worker that plays it


@contextmanager
def running(servers: str, bundle: Path, users: int, apart: bool = False) -> Iterator[tuple[Settings, Fleet, Stopwatch]]:
    """One worker with all roles, or one a role, on topics of their own."""
    with scratch() as name:
        settings = deployment(
            servers, Path(name), partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS, bundle=bundle
        )
        plays = [(role,) for role in ROLES] if apart else [ROLES]
        workers = [Worker(settings, Path(name) / roles[0], roles) for roles in plays]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.wait_ready(180)
            fleet = {role: worker for worker, roles in zip(workers, plays, strict=True) for role in roles}
            yield settings, fleet, Stopwatch(settings, users)
        finally:
            for worker in workers:
                worker.stop()


def sustained(servers: str, bundle: Path, users: int) -> float:
    """Clicks a second at which predictions still come in time, all roles in one worker."""
    with running(servers, bundle, users) as (_, _, watch):
        rate = FIRST_RATE
        watch.run(rate, WARM_S)
        while rate < RATE_LIMIT:
            rate *= RATE_STEP
            taken = watch.run(rate, RATE_S)
            times = [one.after_ms for one in watch.since(time.time() - RATE_S / 4) if one.after_ms is not None]
            if taken < PACE * rate or not times or statistics.median(times) > SUSTAINED_MS:
                break
        return rate / RATE_STEP


def at_load(servers: str, bundle: Path, rate: float, seconds: float, users: int, apart: bool) -> dict[str, Any]:
    """The steady run, and the floor on the same topics when it is over: all times in milliseconds."""
    with running(servers, bundle, users, apart) as (settings, fleet, watch):
        watch.run(rate, WARM_S)
        began, before, cpu = time.time(), counts(fleet), cpu_of(fleet)
        watch.run(rate, seconds)
        cpu = cpu_of(fleet) - cpu
        watch.linger(3)
        took = {name: value - before[name] for name, value in counts(fleet).items()}
    found = watch.since(began)
    size = max(1, round(took["predict_sessions"] / max(1.0, took["predict_batches"])))
    return {
        "predictions": len(found),
        "predictions_per_s": round(len(found) / seconds, 1),
        "fallbacks": sum(one.prediction.fallback is not None for one in found),
        "outside_ms": percentiles([one.after_ms for one in found if one.after_ms is not None]),
        "close_to_emit_ms": percentiles([one.prediction.close_to_emit_ms for one in found]),
        "model_ms": round(1000 * took["predict_seconds"] / max(1.0, took["predict_batches"]), 1),
        "model_within_aim": round(took["predict_in_aim"] / max(1.0, took["predict_batches"]), 4),
        "batch_sessions": size,
        "bare_forecast_ms": percentiles(forecasts(settings, bundle, size)),
        "bare_transaction_ms": percentiles(asyncio.run(_transactions(settings, 200))),
        "cpu_cores": round(cpu / seconds, 2),
        "flush_ms": {
            role: round(1000 * took[f"{role}_flush_s"] / max(1.0, took[f"{role}_flushes"]), 1) for role in ROLES
        },
        "flushes_per_s": {role: round(took[f"{role}_flushes"] / seconds, 1) for role in ROLES},
    }


def counts(fleet: Fleet) -> dict[str, float]:
    """What the workers have counted so far."""
    model, batch = fleet["predict"], "browsecast_batch_seconds"
    found = {
        "predict_sessions": metric(model, "browsecast_batch_sessions_sum"),
        "predict_batches": metric(model, f"{batch}_count"),
        "predict_seconds": metric(model, f"{batch}_sum"),
        "predict_in_aim": metric(model, f"{batch}_bucket", le=MODEL_AIM_S),
    }
    for role, worker in fleet.items():
        found[f"{role}_flushes"] = metric(worker, "browsecast_flush_seconds_count", role=role)
        found[f"{role}_flush_s"] = metric(worker, "browsecast_flush_seconds_sum", role=role)
    return found


def cpu_of(fleet: Fleet) -> float:
    """CPU seconds of the workers and their models so far."""
    workers = {worker.process.pid for worker in fleet.values()}
    return sum(cpu_seconds(pid) for worker in workers for pid in (worker, *children(worker), *models(worker)))


def forecasts(settings: Settings, bundle: Path, size: int) -> list[float]:
    """The ceiling: the same micro-batches in the model, in this process and with nothing beside it."""
    from models.bundle import load_bundle, use_threads

    use_threads(1)
    model = load_bundle(bundle, settings.device)
    sessions = (
        msgspec.json.decode(message.value(), type=Session)
        for message in tail.until_end(settings, settings.topic(SESSIONS))
        if message.value() is not None
    )
    visits = [Visit(one.session_id, [*one.context.history, one.pages]) for one in islice(sessions, 300 * size)]
    times = []
    for start in range(0, len(visits), size):
        began = time.perf_counter()
        model.forecast(visits[start : start + size])
        times.append(1000 * (time.perf_counter() - began))
    return times[1:]  # the first sets up what the others use


async def _transactions(settings: Settings, count: int) -> list[float]:
    """The floor: transactions with nothing beside them, as the engine makes them."""
    sender = AIOKafkaProducer(
        bootstrap_servers=settings.bootstrap_servers,
        transactional_id=f"{settings.topic_prefix}bare",
        max_batch_size=ownership.BATCH_BYTES,
    )
    await sender.start()
    times = []
    try:
        for _ in range(count):
            began = time.perf_counter()
            async with sender.transaction():
                for topic in (settings.topic(PREDICTIONS), settings.changelog("predict")):
                    batch = sender.create_batch()
                    batch.append(key=b"k", value=bytes(500), timestamp=None)
                    await (await sender.send_batch(batch, topic, partition=0))
            times.append(1000 * (time.perf_counter() - began))
    finally:
        await sender.stop()
    return times


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in the unit of the values."""
    if len(values) < 2:
        raise RuntimeError("nothing was measured: did predictions come? A longer --seconds or a higher --rate helps")
    cuts = statistics.quantiles(values, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = parser(__doc__)
    arguments.add_argument("--bundle", type=Path, help="a model bundle; without it a tiny one is trained")
    arguments.add_argument("--rate", type=float, help="clicks a second; half of what the worker sustains unless given")
    arguments.add_argument("--seconds", type=float, default=60)
    arguments.add_argument("--users", type=int, default=20_000)
    arguments.add_argument("--apart", action="store_true", help="each role in a worker of its own")
    given = arguments.parse_args()
    with broker(given.bootstrap_servers, LASTING) as servers, scratch() as name:
        bundle = given.bundle or make_bundle(Path(name))
        most = None if given.rate else sustained(servers, bundle, given.users)
        rate = given.rate or (most or 0) / 2
        found = at_load(servers, bundle, rate, given.seconds, given.users, given.apart)
    print(f"load of {rate:,.0f} clicks/s" + (f", half of the {most:,.0f} that one worker sustains" if most else ""))
    print(f"{found['predictions']:,} predictions, {found['predictions_per_s']} a second")
    print(f"{'ms':56} {'p50':>8} {'p99':>8}")
    for title, key in (
        ("close to published prediction, outside", "outside_ms"),
        ("close to emission, the worker's own figure", "close_to_emit_ms"),
        (f"floor: a micro-batch of {found['batch_sessions']} in the model alone", "bare_forecast_ms"),
        ("floor: a transaction of two records alone", "bare_transaction_ms"),
    ):
        print(f"{title:56} {found[key]['p50']:>8} {found[key]['p99']:>8}")
    print(f"model: {found['model_ms']} ms a micro-batch, {found['model_within_aim']:.1%} of them within 25 ms")
    print(f"transactions, ms: {found['flush_ms']}, a second: {found['flushes_per_s']}; {found['cpu_cores']} cores")
    print(json.dumps({"benchmark": "latency", "clicks_per_s": round(rate), "sustained_clicks_per_s": most, **found}))


if __name__ == "__main__":
    main()
