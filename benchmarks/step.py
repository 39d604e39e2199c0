"""The pure step: a partition's sessionizer on decoded events, no Kafka, no RocksDB. `python -m benchmarks.step`

Every event has an item, and time goes so fast that most sessions close. Each contestant runs a few times, in turn with
the others, and of each batch of events the least CPU counts. The whole job is what a worker does itself with an event:
decode it, step, encode the sessions that close and the records that have changed; Kafka and RocksDB come on top.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.load import GAP_MS, GRACE_MS, Rate, events, table
from streams.channels import Channels
from streams.sessionizer import Sessionizer
from streams.sessions import Policy
from streams.settings import Settings
from streams.wire import Event

BATCH = 1_000
ALONE, WHOLE = "step alone, no channels", "the whole job, no channels"
STEP_MS = 100  # of event time between two events: nothing closes within so few where it is less
ITEMS, CLUSTERS = 10_000, 200  # 2 % of the items


class Table:
    """Items in clusters at random."""

    def __init__(self) -> None:
        choose = random.Random(2)
        self.cluster = {f"i{number}": choose.randrange(CLUSTERS) for number in range(ITEMS)}.get


Took = list[tuple[float, float]]  # seconds of wall clock and of CPU, of each batch


class Contest:
    """What is measured on the same events; what came out of the last run."""

    def __init__(self, count: int, users: int) -> None:
        raw = list(events(count, users, items=ITEMS, step_ms=STEP_MS))
        self.keys, self.values = [key for key, _ in raw], [value for _, value in raw]
        self.decoded = [msgspec.json.decode(value, type=Event) for value in self.values]
        self.closed = self.state_bytes = 0

    def decoding(self) -> Took:
        """The ceiling beside it: decoding the same events."""
        decode = msgspec.json.Decoder(Event).decode
        return self._timed(lambda start: list(map(decode, self.values[start : start + BATCH])))

    def stepping(self, channels: Channels | None, whole: bool) -> Took:
        """Apply all; with `whole` everything that a worker does itself."""
        store: dict[bytes, bytes] = {}
        one = Sessionizer(Policy.of(Settings(gap_ms=GAP_MS, grace_ms=GRACE_MS)), store.get, channels=channels)
        decode, encode, self.closed = msgspec.json.Decoder(Event).decode, msgspec.json.Encoder().encode, 0

        def work(start: int) -> None:
            keys, batch = self.keys[start : start + BATCH], self.decoded[start : start + BATCH]
            if whole:
                batch = [decode(value) for value in self.values[start : start + BATCH]]
            for offset, (key, event) in enumerate(zip(keys, batch, strict=True), start):
                one.apply(key, event, 0, offset)
            self.closed += len(one.closed)
            if whole:
                for _, session in one.closed:
                    encode(session)
                store.update((key, record) for key, record in one.changes() if record is not None)
            one.closed = []

        took = self._timed(work)
        self.state_bytes = sum(map(len, store.values())) // max(len(store), 1)
        return took

    def _timed(self, work: Callable[[int], object]) -> Took:
        """`work` is called with the place of each batch."""
        took = []
        for start in range(0, len(self.keys), BATCH):
            began, cpu = time.perf_counter(), time.process_time()
            work(start)
            took.append((time.perf_counter() - began, time.process_time() - cpu))
        return took


def least(runs: Sequence[Took], count: int) -> Rate:
    """Of each batch the run that took the least."""
    best = [[min(times) for times in zip(*batch, strict=True)] for batch in zip(*runs, strict=True)]
    return Rate(count, sum(wall for wall, _ in best), sum(cpu for _, cpu in best))


def measure(contest: Contest, repeats: int) -> tuple[dict[str, Rate], dict[str, int]]:
    """Each contestant's rate, and the bytes of a user's record."""
    seeding = {"no channels": None} | {
        f"{most} channels": Channels.of(Settings(seed_events=most), Table()) for most in (5, 10)
    }
    runs: dict[str, list[Took]] = {}
    sizes: dict[str, int] = {}
    for _ in range(repeats):
        runs.setdefault("decoding the same events (for scale)", []).append(contest.decoding())
        for name, channels in seeding.items():
            runs.setdefault(f"step alone, {name}", []).append(contest.stepping(channels, whole=False))
        for name, channels in seeding.items():
            runs.setdefault(f"the whole job, {name}", []).append(contest.stepping(channels, whole=True))
            sizes[name] = contest.state_bytes
    return {name: least(all_, len(contest.keys)) for name, all_ in runs.items()}, sizes


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
        more = {name: round(rates[f"step alone, {name}"].cpu_us - rates[ALONE].cpu_us, 2) for name in sizes}
        share = {name: round(rates[f"the whole job, {name}"].cpu_us / rates[WHOLE].cpu_us - 1, 3) for name in sizes}
        for name, size in sizes.items():
            print(f"{name}: {more[name]:+.2f} µs in the step, {share[name]:+.1%} of the job, {size} bytes a user")
        figures = {name: rate.as_json() for name, rate in rates.items()}
        result[f"users_{users}"] = {
            "sessions": contest.closed,
            "state_bytes": sizes,
            "more_us": more,
            "more": share,
        } | figures
    print(json.dumps(result))


if __name__ == "__main__":
    main()
