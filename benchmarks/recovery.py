"""How fast a worker with an empty disk rebuilds its state from the changelog. `python -m benchmarks.recovery`"""

import asyncio
import json
import time
from pathlib import Path

from benchmarks.broker import broker, deployment, parser
from benchmarks.load import GAP_MS, GRACE_MS, cpu_seconds, scratch, seed_state
from streams.changelog import open_changelog
from streams.settings import Settings
from tests.play import metric
from tests.workers import Worker

PARTITIONS = 8


async def _read(settings: Settings, users: int) -> float:
    with open_changelog(settings, settings.changelog("sessionize")) as reader:
        reader.start(await reader.beginnings(range(settings.partitions)))
        began, seen = time.monotonic(), 0
        while seen < users:
            seen += sum(len(part.records) for part in (await reader.take()).values())
        return time.monotonic() - began


def bare_read(settings: Settings, users: int) -> float:
    """The ceiling: seconds that the engine's reader takes to read the same changelog and do nothing with it."""
    return asyncio.run(_read(settings, users))


def restart(settings: Settings, directory: Path) -> dict[str, float]:
    """Start a worker on `directory`; what it restored, in which time, and how long it took until it was ready."""
    worker = Worker(settings, directory, ("sessionize",))
    began = time.monotonic()
    worker.start()
    try:
        worker.wait_ready(300)
        ready_s = time.monotonic() - began
        records = metric(worker, "browsecast_restored_records_total")
        seconds = metric(worker, "browsecast_restore_seconds_sum")
        cpu = cpu_seconds(worker.process.pid)
        worker.terminate()
        worker.wait(30)
    finally:
        worker.stop()
    return {"records": records, "restore_s": seconds, "ready_s": ready_s, "cpu_s": cpu}


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = parser(__doc__)
    arguments.add_argument("--users", type=int, default=300_000)
    given = arguments.parse_args()
    with broker(given.bootstrap_servers) as servers, scratch() as name:
        directory = Path(name)
        settings = deployment(servers, directory, partitions=PARTITIONS, gap_ms=GAP_MS, grace_ms=GRACE_MS)
        size = seed_state(settings, given.users)
        ceiling = bare_read(settings, given.users)
        empty_disk = restart(settings, directory / "w")
        same_disk = restart(settings, directory / "w")
    rate = empty_disk["records"] / empty_disk["restore_s"]
    print(f"changelog of {given.users:,} users, {size:,} bytes each, {PARTITIONS} partitions")
    print(f"bare read by the same reader (ceiling)  {given.users / ceiling:>12,.0f} records/s")
    print(f"restore into RocksDB, state taken up    {rate:>12,.0f} records/s in {empty_disk['restore_s']:.2f} s")
    print(f"start to ready with an empty disk       {empty_disk['ready_s']:>12.1f} s")
    print(f"start to ready with the disk kept       {same_disk['ready_s']:>12.1f} s")
    result = {
        "benchmark": "recovery",
        "users": given.users,
        "state_bytes": size,
        "records_per_s": round(rate),
        "bare_records_per_s": round(given.users / ceiling),
        "empty_disk": empty_disk,
        "same_disk": same_disk,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
