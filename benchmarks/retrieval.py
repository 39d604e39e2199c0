"""Searching for items, one core: exactly among few, exactly and by a graph among many. `python -m benchmarks.retrieval`

Vectors lie in clusters, as those of items do. Beside exact search stands what the memory allows: the time in which
the same bytes can be read. A graph of a million takes long to build; after `--build-minutes` it is measured with the
items that it then has. Times are the least of a few runs, and medians over the queries.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import faiss
import numpy as np

from models.catalogue import Catalogue
from models.items import ItemsFile, ItemTable, RetrieverConfig, unit
from models.search import BUILD_WIDTH, LINKS, exact

WIDTH, K, SEEDS = 64, 100, 10
AIM_MS = 2.5  # 10 seeds over 10,000 items
PER_CLUSTER, COSINE = 50, 0.7  # items of a cluster, on the mean; mean cosine to its centre
CHUNK = 10_000  # items that the graph takes at a time
WIDTHS = (100, 200, 400, 800, 1_600)  # efSearch
PRIOR, CLICKS = 0.2, 3.0  # weight of log(1 + clicks), and the mean of that


def clustered(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 64) unit vectors; clusters differ in size as Zipf's law has it."""
    clusters = max(1, count // PER_CLUSTER)
    centres = unit(rng.normal(size=(clusters, WIDTH)))
    shares = 1 / np.arange(1, clusters + 1) ** 0.5
    which = rng.choice(clusters, count, p=shares / shares.sum())
    noise = rng.standard_normal((count, WIDTH), dtype=np.float32)
    return unit(centres[which] + np.sqrt(1 / COSINE**2 - 1) / np.sqrt(WIDTH) * noise)


def near(vectors: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, 64): what is asked for lies where items are."""
    chosen = vectors[rng.integers(0, len(vectors), count)]
    return unit(chosen + np.sqrt(1 / COSINE**2 - 1) / np.sqrt(WIDTH) * rng.standard_normal(chosen.shape))


def least_ms(work: Callable[[], Any], runs: int) -> float:
    """The first run warms up."""
    times = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - began))
    return min(times[1:])


def catalogue(vectors: np.ndarray, rng: np.random.Generator) -> Catalogue:
    tensors = {
        "vectors": vectors,
        "centroids": vectors[:1],
        "clusters": np.zeros(len(vectors), dtype=np.int32),
        "clicks": rng.geometric(1 / np.exp(CLICKS), len(vectors)).astype(np.float32),
    }
    file = ItemsFile([str(number) for number in range(len(vectors))], RetrieverConfig())
    return Catalogue(ItemTable(file, tensors, "sha256:benchmark"))


def queries(psi: np.ndarray) -> np.ndarray:
    """(S, 64) -> (S, 66), as `models.xpert.XPert` makes them."""
    return np.concatenate([psi, np.full((len(psi), 1), PRIOR), np.zeros((len(psi), 1))], axis=1).astype(np.float32)


def bandwidth() -> float:
    """Bytes a second that one core can read: the ceiling of a product with one vector."""
    block = np.ones(32 << 20, dtype=np.float32)
    return 1e3 * block.nbytes / least_ms(block.max, 20)


def few(items: int, runs: int, speed: float, rng: np.random.Generator) -> dict[str, Any]:
    """All seeds of a visitor over a small catalogue, popularity and bias included."""
    vectors = clustered(items, rng)
    table, asked = catalogue(vectors, rng), queries(near(vectors, SEEDS, rng))
    found = least_ms(lambda: exact(table, asked, [0, 1, 2], K), runs)
    floor = 1e3 * table.matrix.nbytes / speed
    print(f"{SEEDS} seeds over {items:,} items, exact: {found:.2f} ms (aim {AIM_MS} ms; memory alone {floor:.2f} ms)")
    return {"items": items, "ms": round(found, 3), "memory_ms": round(floor, 3), "aim_ms": AIM_MS}


def many(
    items: int, asked: int, minutes: float, threads: int, speed: float, rng: np.random.Generator
) -> dict[str, Any]:
    """One query over a large catalogue, by cosine: the graph beside exact search of the same items."""
    vectors = clustered(items, rng)
    graph, built_s = build(vectors, minutes, threads)
    vectors = vectors[: graph.ntotal]
    print(f"graph of {len(vectors):,} of {items:,} items: {built_s:.0f} s on {threads} threads")
    psi = near(vectors, asked, rng)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors)
    faiss.omp_set_num_threads(1)
    wanted = flat.search(psi, K)[1]
    exact_ms, _ = one_by_one(flat, psi[:50])
    floor = 1e3 * vectors.nbytes / speed
    print(f"one query over {len(vectors):,}, exact: {exact_ms:.2f} ms (memory alone {floor:.2f} ms)")
    found = []
    for width in WIDTHS:
        graph.hnsw.efSearch = width
        ms, got = one_by_one(graph, psi)
        recall = float(np.mean([len(set(a) & set(b)) / K for a, b in zip(got.tolist(), wanted.tolist(), strict=True)]))
        print(f"    efSearch {width:>5,}: recall@{K} {recall:.3f}, {ms:.2f} ms")
        found.append({"ef_search": width, "recall": round(recall, 4), "ms": round(ms, 3)})
    return {
        "items": len(vectors), "build_s": round(built_s, 1), "exact_ms": round(exact_ms, 3),
        "memory_ms": round(floor, 3), "graph": found,
    }  # fmt: skip


def one_by_one(index: Any, psi: np.ndarray) -> tuple[float, np.ndarray]:
    """Median milliseconds of a query, and what all found, (Q, K)."""
    times, found = [], []
    for one in psi:
        began = time.perf_counter()
        found.append(index.search(one[None], K)[1][0])
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times)), np.stack(found)


def build(vectors: np.ndarray, minutes: float, threads: int) -> tuple[Any, float]:
    """A graph of as many as fit into the time, and how long it took (seconds)."""
    faiss.omp_set_num_threads(threads)
    graph = faiss.IndexHNSWFlat(WIDTH, LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = BUILD_WIDTH
    began = time.perf_counter()
    for start in range(0, len(vectors), CHUNK):
        graph.add(vectors[start : start + CHUNK])
        if time.perf_counter() - began > 60 * minutes:
            break
    return graph, time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=10_000, help="items of the small catalogue")
    parser.add_argument("--many", type=int, default=1_000_000, help="items of the large one")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--build-minutes", type=float, default=8.0)
    parser.add_argument("--threads", type=int, default=2, help="that build the graph; searches have one")
    parser.add_argument("--runs", type=int, default=200)
    chosen = parser.parse_args(arguments)
    rng = np.random.default_rng(0)
    speed = bandwidth()
    print(f"one core reads {speed / 1e9:.1f} GB/s")
    found = {
        "benchmark": "retrieval",
        "gb_s": round(speed / 1e9, 2),
        "few": few(chosen.few, chosen.runs, speed, rng),
        "many": many(chosen.many, chosen.queries, chosen.build_minutes, chosen.threads, speed, rng),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
