"""retrieval.parquet: what every retriever ranked for every case, beside what was then clicked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from trainer.interactions import NONE, Cases, Task
from trainer.items import Space
from trainer.retrievers import Ranking

RANKINGS = "retrieval.parquet"


@dataclass(frozen=True)
class Judged:
    """The cases of a report, and what is told of each beside its labels."""

    cases: Cases
    history: np.ndarray  # (C,) int64: clicks of the user before
    clicks: np.ndarray  # (L,) int64: of each label, as the snapshot knew
    indexed: np.ndarray  # (L,) bool: whether the snapshot held it
    seeded: np.ndarray  # (C,) bool: whether anything that the user clicked before has a vector

    @classmethod
    def of(cls, task: Task, cases: Cases, spaces: Sequence[Space]) -> "Judged":
        """What the task, and a space for each of its snapshots, tell of the cases."""
        owner = np.repeat(np.arange(len(cases)), np.diff(cases.starts))
        clicks, indexed = np.zeros(len(owner), dtype=np.int64), np.zeros(len(owner), dtype=bool)
        seeded = np.zeros(len(cases), dtype=bool)
        for snapshot, rows in cases.by_snapshot():
            for row in rows.tolist():
                seeded[row] = (spaces[snapshot].rows(cases.history(row)) != NONE).any()
            mine = np.isin(owner, rows)
            clicks[mine] = task.known(snapshot).popularity()[cases.labels[mine]]
            indexed[mine] = np.isin(cases.labels[mine], task.snapshots[snapshot].items)
        return cls(cases, cases.end - cases.log.first[cases.user], clicks, indexed, seeded)


def write_rankings(judged: Judged, rankings: Mapping[str, Ranking], directory: Path) -> Path:
    """Write retrieval.parquet, a row a case and retriever; returns its path."""
    path = directory / RANKINGS
    pq.write_table(pa.concat_tables(_table(judged, *one) for one in rankings.items()), path, compression="zstd")
    return path


def _table(judged: Judged, name: str, ranking: Ranking) -> pa.Table:
    """Columns: user_id, predictor, opens (the target opens a session), history (clicks before), seeded (one of them has
    a vector), target with the clicks that its items had and whether they were in the index, items ranked with score and
    seed (null: none brought it).
    """
    cases = judged.cases
    names = pa.array(cases.log.items, pa.string())
    there = ranking.items != NONE
    ends = np.concatenate([[0], np.cumsum(there.sum(axis=1))])

    def lists(offsets: np.ndarray, values: pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

    def items(indices: np.ndarray) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32(), mask=indices == NONE), names)

    return pa.table(
        {
            "user_id": [cases.log.users[user] for user in cases.user.tolist()],
            "predictor": pa.array([name] * len(cases)),
            "opens": cases.opens,
            "history": judged.history,
            "seeded": judged.seeded,
            "target": lists(cases.starts, items(cases.labels)),
            "target_clicks": lists(cases.starts, pa.array(judged.clicks)),
            "target_indexed": lists(cases.starts, pa.array(judged.indexed)),
            "items": lists(ends, items(ranking.items[there])),
            "scores": lists(ends, pa.array(ranking.scores[there])),
            "seeds": lists(ends, items(ranking.seeds[there])),
        }
    )
