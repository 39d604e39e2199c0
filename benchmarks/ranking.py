"""The items of a prediction, made by a bundle's retriever on one core. `python -m benchmarks.ranking`

Each way of ranking on the same made-up catalogue and visitors, one at a time and in micro-batches, beside the ceiling:
the product of the queries with all items and its maximum, which no exact search can do without.
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from models.items import ItemTable, SeedRule
from models.retriever import Retriever
from models.visit import Interest
from tests.goods import goods

WIDTH = 64
RANKERS = ("popularity", "counts", "nearest", "shared", "residual", "personal", "personal, fused")


def interests(items: int, seeds: int, count: int) -> list[Interest]:
    """Visitors with so many seeds, 30 recent items and a session of ten."""
    rng, found = np.random.default_rng(1), []
    for _ in range(count):
        ids = [f"i{number}" for number in rng.choice(items, 30, replace=False)]
        found.append(Interest([(ids[n], n, 0.9**n) for n in range(seeds)], ids, ids[:10], ids[5:6]))
    return found


def took_ms(work: Callable[[int], object], turns: int) -> tuple[float, float]:
    """Median and 95th percentile of the CPU milliseconds of a turn, after some to warm up."""
    times = []
    for turn in range(turns + 5):
        began = time.thread_time()
        work(turn)
        times.append(1000 * (time.thread_time() - began))
    middle, high = np.percentile(times[5:], [50, 95])
    return round(float(middle), 3), round(float(high), 3)


def ceiling_ms(items: int, seeds: int, turns: int) -> tuple[float, float]:
    """The bare product and its maximum."""
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(items, WIDTH + 2)).astype(np.float32)
    queries = rng.normal(size=(turns + 5, seeds, WIDTH + 2)).astype(np.float32)
    return took_ms(lambda turn: (queries[turn] @ matrix.T).max(axis=0), turns)


def ranker_ms(name: str, items: int, seeds: int, turns: int, batch: int) -> dict[str, float]:
    """Of one way of ranking: alone, and for each of a micro-batch."""
    ranker, _, fused = name.partition(", ")
    made = goods(items, items // 50, width=WIDTH, ranker=ranker, fused=bool(fused), seeding=SeedRule(most=seeds))
    retriever = Retriever(ItemTable(*made, "made up"), 20)
    visitors = interests(items, seeds, turns + 5 + batch)
    median, high = took_ms(lambda turn: retriever.rank(visitors[turn : turn + 1]), turns)
    together, _ = took_ms(lambda turn: retriever.rank(visitors[turn : turn + batch]), max(turns // batch, 5))
    return {"ms": median, "p95_ms": high, "ms_in_batch": round(together / batch, 3)}


def main() -> None:
    """Print the table, then one JSON line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--items", type=int, default=10_000)
    arguments.add_argument("--seeds", type=int, default=10)
    arguments.add_argument("--turns", type=int, default=200)
    arguments.add_argument("--batch", type=int, default=16)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    print(f"{given.seeds} seeds, {given.items:,} items, one core: milliseconds of CPU a prediction")
    print(f"{'':40}{'median':>9}{'p95':>9}{'in a batch of ' + str(given.batch):>20}")
    ceiling = ceiling_ms(given.items, given.seeds, given.turns)
    print(f"{'product and maximum (ceiling)':40}{ceiling[0]:>9.2f}{ceiling[1]:>9.2f}")
    found = {}
    for name in RANKERS:
        found[name] = one = ranker_ms(name, given.items, given.seeds, given.turns, given.batch)
        print(f"{name:40}{one['ms']:>9.2f}{one['p95_ms']:>9.2f}{one['ms_in_batch']:>20.2f}", flush=True)
    print(json.dumps({"benchmark": "ranking", **vars(given), "ceiling_ms": ceiling[0], "rankers": found}))


if __name__ == "__main__":
    main()
