"""The pure step: a partition's sessionizer on decoded events, no Kafka, no RocksDB. `python -m benchmarks.step`"""

import argparse
import json
import time

import msgspec

from benchmarks.load import GAP_MS, GRACE_MS, Rate, events, table
from streams.sessionizer import Sessionizer
from streams.sessions import Policy
from streams.settings import Settings
from streams.wire import Event

BATCH = 5_000


def decoding(values: list[bytes]) -> Rate:
    """The ceiling beside it: decoding the same events."""
    decode, began, cpu = msgspec.json.Decoder(Event).decode, time.perf_counter(), time.process_time()
    for value in values:
        decode(value)
    return Rate(len(values), time.perf_counter() - began, time.process_time() - cpu)


def stepping(keys: list[bytes], decoded: list[Event], encode: bool) -> tuple[Rate, int]:
    """Apply all, with the records that a flush would write if `encode`; the rate, and how many sessions closed."""
    store: dict[bytes, bytes] = {}
    policy = Policy.of(Settings(gap_ms=GAP_MS, grace_ms=GRACE_MS))
    one, closed = Sessionizer(policy, store.get), 0
    began, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(keys), BATCH):
        for offset, (key, event) in enumerate(
            zip(keys[start : start + BATCH], decoded[start : start + BATCH], strict=True)
        ):
            one.apply(key, event, 0, start + offset)
        closed += len(one.closed)
        one.closed = []
        if encode:
            store.update((key, record) for key, record in one.changes() if record is not None)
    return Rate(len(keys), time.perf_counter() - began, time.process_time() - cpu), closed


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--events", type=int, default=300_000)
    arguments.add_argument("--users", type=int, nargs="*", default=[20_000, 200_000])
    given = arguments.parse_args()
    result: dict[str, object] = {"benchmark": "step"}
    for users in given.users:
        raw = list(events(given.events, users))
        keys, values = [key for key, _ in raw], [value for _, value in raw]
        decoded = [msgspec.json.decode(value, type=Event) for value in values]
        step, closed = stepping(keys, decoded, encode=False)
        rates = {
            "decoding the same events (for scale)": decoding(values),
            f"step alone, {closed:,} sessions closed": step,
            "step and the records of each flush": stepping(keys, decoded, encode=True)[0],
        }
        table(f"{users:,} users", list(rates.items()))
        result[f"users_{users}"] = {"sessions": closed} | {
            name: rate.as_json()
            for name, rate in zip(("decode", "step", "step_and_encode"), rates.values(), strict=True)
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
