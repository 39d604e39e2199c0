"""The sessionizing worker, catching up and live, beside stock Faust and Quix Streams with the same job in the same run.

Run `python -m benchmarks.sessionize [--bootstrap-servers HOST:PORT]`. Quix Streams lives in .venv-bench:
`python -m venv .venv-bench && .venv-bench/bin/pip install --require-hashes -r benchmarks/requirements.lock`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.broker import broker, deployment, parser
from benchmarks.load import (
    GAP_MS,
    GRACE_MS,
    HISTORY_PAGES,
    HISTORY_SESSIONS,
    STEP_MS,
    Position,
    Rate,
    bare_rate,
    events,
    measure,
    publish,
    scratch,
    seed_state,
    table,
)
from streams.settings import Settings
from streams.wire import CLICKS, SESSIONS
from tests.bundle import make_bundle
from tests.goods import goods, with_items
from tests.workers import Worker

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-bench" / "bin" / "python"
PARTITIONS = 8
ITEMS = 2_000
OFF, ON = "bundle without items", "bundle with items: channels"


@contextmanager
def ours(settings: Settings, directory: Path) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Our worker in the role sessionize, ready."""
    worker = Worker(settings, directory, ("sessionize",))
    worker.start()
    try:
        worker.wait_ready(180)
        yield worker.process, worker.log
    finally:
        worker.stop()


@contextmanager
def peer(
    settings: Settings, directory: Path, command: list[str], group: str, **more: str
) -> Iterator[tuple["subprocess.Popen[bytes]", Path]]:
    """Another framework's worker, which gets the job through its environment."""
    directory.mkdir(parents=True, exist_ok=True)
    own = {
        "BOOTSTRAP_SERVERS": settings.bootstrap_servers,
        "GROUP": group,
        "STATE_DIR": str(directory / "state"),
        "PARTITIONS": str(settings.partitions),
        "CLICKS": settings.topic(CLICKS),
        "SESSIONS": settings.topic(SESSIONS),
        "GAP_MS": str(GAP_MS),
        "GRACE_MS": str(GRACE_MS),
        "PAST_PAGES": str(HISTORY_SESSIONS * HISTORY_PAGES),
    }
    log = directory / "log"
    with log.open("ab") as out:
        process = subprocess.Popen(command, env={**os.environ, **own, **more}, stdout=out, stderr=out, cwd=ROOT)
    try:
        yield process, log
    finally:
        process.kill()
        process.wait()


def catching_up(servers: str, users: int, count: int, peer_count: int, faust_count: int) -> dict[str, Rate]:
    """All contestants on one log that is there already, one after the other, and the ceiling."""
    rates: dict[str, Rate] = {}
    with scratch() as name:
        directory = Path(name)
        settings = deployment(servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS)
        size = seed_state(settings, users)
        publish(settings, events(count, users))
        print(f"\n{users:,} users of {size:,} bytes of state, {count:,} events in {PARTITIONS} partitions", flush=True)
        rates["bare consume and decode (ceiling)"] = bare_rate(settings, count)
        topic = settings.topic(CLICKS)
        with ours(settings, directory / "ours") as (process, log):
            rates["browsecast sessionize, exactly once"] = measure(
                process, Position(settings, settings.application("sessionize"), topic), count, log
            )
        for form in ("state", "window") if PEERS_PYTHON.exists() else ():
            group = f"{settings.topic_prefix}quix-{form}"
            command = [str(PEERS_PYTHON), str(ROOT / "benchmarks" / "quix.py")]
            until = peer_count if form == "state" else peer_count // 4
            with peer(settings, directory / form, command, group, FORM=form) as (process, log):
                rates[f"Quix Streams {form}, at least once"] = measure(
                    process, Position(settings, group, topic), until, log
                )
        group = f"{settings.topic_prefix}faust"
        command = [sys.executable, str(ROOT / "benchmarks" / "stock_faust.py")]
        with peer(settings, directory / "faust", command, group) as (process, log):
            rates["stock Faust table, at least once"] = measure(
                process, Position(settings, group, topic), faust_count, log
            )
    return rates


def live(servers: str, users: int, per_second: float, count: int) -> Rate:
    """Our worker while events come in at a steady pace."""
    with scratch() as name:
        directory = Path(name)
        settings = deployment(servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS)
        seed_state(settings, users)
        with ours(settings, directory / "ours") as (process, log):
            own = ["--publish", str(count), "--users", str(users), "--pace", str(per_second)]
            where = ["--prefix", settings.topic_prefix, "--bootstrap-servers", servers]
            sender = subprocess.Popen([sys.executable, "-m", "benchmarks.sessionize", *own, *where], cwd=ROOT)
            position = Position(settings, settings.application("sessionize"), settings.topic(CLICKS))
            try:
                return measure(process, position, count, log)
            finally:
                sender.kill()
                sender.wait()


def channels(servers: str, users: int, count: int, turns: int = 3) -> dict[str, Rate]:
    """Our worker on clicks that all have an item, most sessions closing, with a bundle that knows the items and
    with the same without them.

    They take turns, each time on topics of their own, and the run with the least CPU counts.
    """
    runs: dict[str, list[Rate]] = {}
    with scratch() as name:
        plain = make_bundle(Path(name))
        bundles = {OFF: plain, ON: with_items(plain, Path(name) / "items", goods(ITEMS, ITEMS // 50))}
        for turn, (label, bundle) in enumerate(list(bundles.items()) * turns):
            directory = Path(name) / str(turn)
            settings = deployment(servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS)
            settings = settings.but(bundle=bundle)
            seed_state(settings, users)
            publish(settings, events(count, users, items=ITEMS, step_ms=10 * STEP_MS))
            with ours(settings, directory / "ours") as (process, log):
                position = Position(settings, settings.application("sessionize"), settings.topic(CLICKS))
                runs.setdefault(label, []).append(measure(process, position, count, log))
    return {label: min(rates, key=lambda rate: rate.cpu_us) for label, rates in runs.items()}


def main() -> None:
    """Print a table for each number of users, then one JSON line."""
    arguments = parser(__doc__)
    arguments.add_argument("--users", type=int, nargs="*", default=[20_000, 200_000])
    arguments.add_argument("--events", type=int, default=600_000)
    arguments.add_argument(
        "--pace", type=float, default=10_000, help="events a second of the live run; 0 leaves it out"
    )
    arguments.add_argument("--channels", action="store_true", help="only what channels of items cost the worker")
    arguments.add_argument("--publish", type=int, help="only publish so many events (the live run's own producer)")
    arguments.add_argument("--prefix", default="")
    given = arguments.parse_args()
    if given.publish:
        settings = Settings(bootstrap_servers=given.bootstrap_servers, topic_prefix=given.prefix, partitions=PARTITIONS)
        publish(settings, events(given.publish, given.users[0]), given.pace)
        return
    if not (given.channels or PEERS_PYTHON.exists()):
        print("Quix Streams is left out: see the head of benchmarks/sessionize.py for how to install it")
    result: dict[str, object] = {"benchmark": "sessionize", "cores": os.cpu_count()}
    with broker(given.bootstrap_servers) as servers:
        for users in given.users:
            if given.channels:
                rates = channels(servers, users, given.events)
                table(f"{users:,} users, every click on an item", list(rates.items()))
                more = rates[ON].cpu_us / rates[OFF].cpu_us - 1
                print(f"channels cost {more:+.1%} of CPU an event; aim: at most +15 %")
                result[f"channels_{users}"] = {name: rate.as_json() for name, rate in rates.items()} | {"more": more}
                continue
            rates = catching_up(servers, users, given.events, given.events // 2, given.events // 20)
            if given.pace:
                rates[f"browsecast sessionize, live at {given.pace:,.0f}/s"] = live(
                    servers, users, given.pace, int(30 * given.pace)
                )
            table(f"{users:,} users", list(rates.items()))
            result[f"users_{users}"] = {name: rate.as_json() for name, rate in rates.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
