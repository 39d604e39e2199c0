"""The pure step: a partition's sessionizer on decoded events, no Kafka, no RocksDB. `python -m benchmarks.step`

Every event has an item, and time goes so fast that most sessions close. Each contestant runs a few times, in turn with
the others, and the least CPU counts.
"""

import argparse
import json
import random
import time

import msgspec

from benchmarks.load import BASE_MS, GAP_MS, GRACE_MS, Rate, events, table
from streams.channels import Channels
from streams.sessionizer import Sessionizer
from streams.sessions import Policy
from streams.settings import Settings
from streams.wire import Event

BATCH = 5_000
FASTER = 10  # event time, than in the other benchmarks: nothing closes there within so few events
ITEMS, CLUSTERS = 10_000, 200  # 2 % of the items


class Table:
    """Items in clusters at random."""

    def __init__(self) -> None:
        choose = random.Random(2)
        self.cluster = {f"item-{number:05d}": choose.randrange(CLUSTERS) for number in range(ITEMS)}.get


class Contest:
    """What is measured on the same events: the least CPU of a few runs, and what came out of the last."""

    def __init__(self, count: int, users: int) -> None:
        raw, choose = list(events(count, users)), random.Random(3)
        self.keys, self.values = [key for key, _ in raw], [value for _, value in raw]
        self.decoded = [msgspec.json.decode(value, type=Event) for value in self.values]
        for event in self.decoded:  # the few popular ones are half of what is looked at
            event.item_id = f"item-{int(ITEMS * choose.random() ** 4):05d}"
            event.ts = BASE_MS + FASTER * (event.ts - BASE_MS)
        self.closed = self.state_bytes = 0

    def decoding(self) -> Rate:
        """The ceiling beside it: decoding the same events."""
        decode, began, cpu = msgspec.json.Decoder(Event).decode, time.perf_counter(), time.process_time()
        for value in self.values:
            decode(value)
        return Rate(len(self.values), time.perf_counter() - began, time.process_time() - cpu)

    def stepping(self, channels: Channels | None, encode: bool) -> Rate:
        """Apply all, with the records that a flush would write if `encode`."""
        store: dict[bytes, bytes] = {}
        one = Sessionizer(Policy.of(Settings(gap_ms=GAP_MS, grace_ms=GRACE_MS)), store.get, channels=channels)
        self.closed = 0
        began, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(self.keys), BATCH):
            batch = zip(self.keys[start : start + BATCH], self.decoded[start : start + BATCH], strict=True)
            for offset, (key, event) in enumerate(batch, start):
                one.apply(key, event, 0, offset)
            self.closed += len(one.closed)
            one.closed = []
            if encode:
                store.update((key, record) for key, record in one.changes() if record is not None)
        rate = Rate(len(self.keys), time.perf_counter() - began, time.process_time() - cpu)
        self.state_bytes = sum(map(len, store.values())) // max(len(store), 1)
        return rate


def measure(contest: Contest, repeats: int) -> tuple[dict[str, Rate], dict[str, int]]:
    """The least CPU of each contestant, and the bytes of a user's record."""
    seeding = {"no channels": None} | {
        f"{most} channels": Channels.of(Settings(seed_events=most), Table()) for most in (5, 10)
    }
    rates: dict[str, list[Rate]] = {}
    sizes: dict[str, int] = {}
    for _ in range(repeats):
        rates.setdefault("decoding the same events (for scale)", []).append(contest.decoding())
        for name, channels in seeding.items():
            rates.setdefault(f"step alone, {name}", []).append(contest.stepping(channels, encode=False))
        for name, channels in seeding.items():
            rates.setdefault(f"step and records, {name}", []).append(contest.stepping(channels, encode=True))
            sizes[name] = contest.state_bytes
    return {name: min(all_, key=lambda rate: rate.cpu_us) for name, all_ in rates.items()}, sizes


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events", type=int, default=300_000)
    arguments.add_argument("--users", type=int, nargs="*", default=[20_000, 200_000])
    arguments.add_argument("--repeats", type=int, default=3)
    given = arguments.parse_args()
    result: dict[str, object] = {"benchmark": "step"}
    for users in given.users:
        contest = Contest(given.events, users)
        rates, sizes = measure(contest, given.repeats)
        table(f"{users:,} users, {contest.closed:,} sessions closed", list(rates.items()))
        more = {
            name: round(rates[f"step and records, {name}"].cpu_us - rates["step and records, no channels"].cpu_us, 2)
            for name in sizes
        }
        print("\n".join(f"{name}: {more[name]:+.2f} µs an event, {sizes[name]} bytes a user" for name in sizes))
        figures = {name: rate.as_json() for name, rate in rates.items()}
        result[f"users_{users}"] = {"sessions": contest.closed, "state_bytes": sizes, "more_us": more} | figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
