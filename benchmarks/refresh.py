"""What a refresh costs while everything runs: into the archive, to a new bundle, into service.

`python -m benchmarks.refresh`. Three measurements on a real broker:

archive  a worker cuts sessions, a trainer archives them; from the time of a session's record (its close) to the moment
         when a reader of the archive finds it. Floor: the bare write of as many sessions as a commit holds.
refresh  the trainer's cycle on an archive of made visitors, warm start from a champion: fit, judge, publish. Floor: the
         bare copy of the bundle.
swap     a worker under load; the alias champion moves now and then. The longest time without a prediction around a
         swap, beside the longest in as much time without one. Floor: the bare load of the bundle in this process.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from threading import Event
from typing import Any

import msgspec
import pyarrow.parquet as pq

from benchmarks.broker import broker, deployment, parser
from benchmarks.latency import percentiles
from benchmarks.load import scratch
from benchmarks.stopwatch import Stopwatch
from benchmarks.swaps import GAP_MS, GRACE_MS, PARTITIONS, USERS, WARM_S, swaps, worker
from streams import tail
from streams.aliases import Aliases
from streams.bundles import local
from streams.settings import Settings
from streams.wire import SESSIONS
from tests.bundle import make_bundle
from tests.trainer.refreshing import archive, shop
from tests.workers import environment, free_port
from trainer.archive import Archive
from trainer.candidate import FITTED
from trainer.cycle import Cycle
from trainer.plan import DONE, OUTCOME, PLAN
from trainer.refresh_options import RefreshOptions
from trainer.registry import Registry

LOOK_S, PATIENCE_S = 0.02, 60.0
EVER = 1 << 62


@contextmanager
def trainer(settings: Settings, directory: Path) -> Iterator[None]:
    """A process that archives, once it does."""
    settings = settings.but(trainer_port=free_port())
    with (directory / "trainer.log").open("wb") as log:
        command = [sys.executable, "-m", "streams.cli", "trainer", "--role", "archive"]
        process = subprocess.Popen(command, env=environment(settings), stdout=log, stderr=log)
    try:
        while not (directory / "archive").exists():  # made when it opens the archive
            if process.poll() is not None:
                raise RuntimeError(f"the trainer ended: {(directory / 'trainer.log').read_text()[-2_000:]}")
            time.sleep(LOOK_S)
        yield
    finally:
        process.terminate()
        process.wait(60)


# ---------------------------------------------------------------- into the archive


def archive_delay(servers: str, rate: float, seconds: float, flush_ms: int) -> dict[str, Any]:
    """From a session's close to its presence in the archive, in milliseconds."""
    with scratch() as place:
        directory = Path(place)
        settings = deployment(
            servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS,
            archive_dir=directory / "archive", archive_flush_ms=flush_ms,
        )  # fmt: skip
        present, stop = dict[str, float](), Event()
        looking = threading.Thread(target=_look, args=(directory / "archive", present, stop))
        with worker(settings, directory / "w", ("sessionize",)), trainer(settings, directory):
            looking.start()
            watch, began_ms = Stopwatch(settings, USERS), 1000 * (time.time() + WARM_S)
            watch.run(rate, WARM_S + seconds)
            closed = _closed(settings)
            if not closed:
                raise RuntimeError("no session has closed: a longer --seconds or a higher --rate helps")
            deadline = time.monotonic() + PATIENCE_S
            while closed.keys() - present.keys() and time.monotonic() < deadline:
                time.sleep(LOOK_S)
            stop.set()
            looking.join()
        missing = closed.keys() - present.keys()
        if missing:
            raise RuntimeError(f"{len(missing)} of {len(closed)} sessions did not come into the archive in time")
        delays = [1000 * present[one] - at_ms for one, at_ms in closed.items() if at_ms >= began_ms]
        commits = Archive(directory / "archive").manifest().commit
        size = max(1, len(closed) // commits)
        floor = _bare_write(directory, size)
    return {"sessions": len(delays), "flush_ms": flush_ms, "commit_sessions": size, "delay_ms": percentiles(delays),
            "bare_write_ms": floor}  # fmt: skip


def _closed(settings: Settings) -> dict[str, int]:
    """When each session was closed (epoch ms), of those that are there now."""
    return {
        msgspec.json.decode(message.value())["session_id"]: message.timestamp()[1]
        for message in tail.until_end(settings, settings.topic(SESSIONS))
    }


def _look(directory: Path, present: dict[str, float], stop: Event) -> None:
    """Note when a reader finds each session."""
    reader, commit = Archive(directory), 0
    while not stop.wait(LOOK_S):
        manifest = reader.manifest()
        if manifest.commit == commit:
            continue
        commit, now = manifest.commit, time.time()
        for one in reader.read_window(0, EVER)["session_id"].to_pylist():
            present.setdefault(one, now)


def _bare_write(directory: Path, sessions: int) -> float:
    """Milliseconds of one Parquet file of so many sessions, written and synced."""
    table = Archive(directory / "archive").read_window(0, EVER).slice(0, sessions)
    times = []
    for number in range(10):
        began = time.perf_counter()
        with (directory / f"bare{number}").open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        times.append(1000 * (time.perf_counter() - began))
    return round(sorted(times)[len(times) // 2], 1)


# ---------------------------------------------------------------- a refresh


def refresh(servers: str, visitors: int, days: float) -> dict[str, Any]:
    """A cycle with a warm start, in seconds by step."""
    with scratch() as place:
        directory = Path(place)
        settings = deployment(servers, directory, partitions=PARTITIONS)
        # How long it takes is measured here, not how good it is.
        options = RefreshOptions(sessions=1, least=1, margin=1.0, device="cpu")
        aliases, registry = Aliases(settings), Registry(str(directory / "registry"))
        cache = directory / "bundles"
        sessions = shop(visitors, 2 * days)
        half = len(sessions) // 2
        archive(directory / "archive", sessions[:half])
        cycle = Cycle(
            directory / "cycles", Archive(directory / "archive"), registry, aliases,
            lambda alias: local(alias.uri, alias.digest, cache), options,
        )  # fmt: skip
        first = cycle.run("the first champion", Event())
        archive(directory / "archive", sessions[half:])
        stop, seen = Event(), dict[str, float]()
        before = set((directory / "cycles").iterdir())
        watching = threading.Thread(target=_watch_steps, args=(directory / "cycles", before, seen, stop))
        watching.start()
        began = time.time()
        done = cycle.run("the benchmark", Event())
        took = time.time() - began
        stop.set()
        watching.join()
        (bundle,) = registry.bundles()[-1:]
        copied = time.perf_counter()
        shutil.copytree(bundle.uri.removeprefix("file://"), directory / "copy")
        copied = time.perf_counter() - copied
    steps = [began, *(seen[name] for name in (PLAN, FITTED, OUTCOME, DONE))]
    named = dict(zip(("plan", "fit", "judge", "publish"), (b - a for a, b in pairwise(steps)),
                     strict=True))  # fmt: skip
    return {
        "sessions": len(sessions), "visitors": visitors, "seconds": round(took, 1),
        "steps_s": {step: round(value, 2) for step, value in named.items()},
        "results": [one.result if one else None for one in (first, done)],
        "bundle_bytes": bundle.bytes, "bare_copy_ms": round(1000 * copied, 1),
    }  # fmt: skip


def _watch_steps(cycles: Path, before: set[Path], seen: dict[str, float], stop: Event) -> None:
    """Note when each step of the new cycle has left what it leaves."""
    while not stop.wait(LOOK_S) or DONE not in seen:
        for place in set(cycles.iterdir()) - before:
            for step in (PLAN, FITTED, OUTCOME, DONE):
                if step not in seen and (place / step).exists():
                    seen[step] = time.time()


def main() -> None:
    """Print the figures, then one JSON line."""
    arguments = parser(__doc__)
    arguments.add_argument("--bundle", type=Path, help="a model bundle; without it a tiny one is trained")
    arguments.add_argument("--rate", type=float, default=400, help="clicks a second")
    arguments.add_argument("--seconds", type=float, default=40, help="of each run into the archive")
    arguments.add_argument("--visitors", type=int, default=1_000, help="of the refresh")
    arguments.add_argument("--days", type=float, default=4, help="of each half of the refresh's window")
    arguments.add_argument("--swaps", type=int, default=5)
    given = arguments.parse_args()
    with broker(given.bootstrap_servers) as servers, scratch() as place:
        bundle = given.bundle or make_bundle(Path(place))
        found = {
            "archive": [archive_delay(servers, given.rate, given.seconds, flush_ms) for flush_ms in (10_000, 1_000)],
            "refresh": refresh(servers, given.visitors, given.days),
            "swap": swaps(servers, bundle, given.rate, given.swaps),
        }
    _print(given.rate, found)
    print(json.dumps({"benchmark": "refresh", "clicks_per_s": given.rate, **found}))


def _print(rate: float, found: dict[str, Any]) -> None:
    print(f"{rate:,.0f} clicks/s")
    for run in found["archive"]:
        p50, p99 = (run["delay_ms"][name] / 1000 for name in ("p50", "p99"))
        print(f"close to archive, commits every {run['flush_ms'] / 1000:g} s: p50 {p50:.2f} s, p99 {p99:.2f} s")
        print(f"  bare write of the {run['commit_sessions']} sessions of a commit (floor): {run['bare_write_ms']} ms")
    one, swap = found["refresh"], found["swap"]
    print(f"refresh on {one['sessions']:,} sessions of {one['visitors']:,} visitors: {one['seconds']} s")
    print(f"  {one['steps_s']}; bare copy of the bundle (floor): {one['bare_copy_ms']} ms")
    print(f"{swap['swaps']} swaps, each {swap['seconds']} s beside the champion that serves")
    print(f"  bare load of the bundle (floor): {swap['bare_load_s']} s")
    print(f"longest time without a prediction, ms: {swap['longest_gap_ms']} around a swap")
    print(f"  {swap['longest_gap_without_ms']} in a run without one; {swap['turn_gap_ms']} within 0.2 s of each turn")
    print(f"close to published prediction, ms: {swap['close_to_prediction_ms']}, {swap['fallbacks']} fallbacks")


if __name__ == "__main__":
    main()
