"""Sessions to learn from and sessions that came after them to judge with: divided by time, never by chance."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trainer.corpus import place_of
from trainer.errors import TrainingError

FEWEST_USERS = 30  # who judge


class Holdout(NamedTuple):
    """`window`: sessions that ended before `cut_ms`. `judged`: all sessions of visitors whose last began after it."""

    window: pa.Table
    judged: pa.Table
    cut_ms: int

    def write(self, window: Path, judged: Path) -> None:
        """Each table as a session file in a directory of its own."""
        for table, directory in ((self.window, window), (self.judged, judged)):
            directory.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, directory / "sessions.parquet", compression="zstd")


def hold_out(sessions: pa.Table, new: int, share: float, most_users: int) -> Holdout:
    """Divide by the end of a session: the latest `share` of the `new` latest sessions come after the window.

    A session that is under way at the cut is in neither part, but may be history of a judged visitor. Judged are
    visitors with a session after the cut and one before that, at most so many, whom a hash of their ids chooses.
    Raises TrainingError when hardly anybody is left to judge.
    """
    ends = np.sort(sessions["end_ms"].to_numpy())
    latest = min(len(ends), max(1, round(share * min(new, len(ends)))))
    cut_ms = int(ends[-latest]) if latest else 0
    later = sessions.filter(pc.greater_equal(sessions["start_ms"], cut_ms))
    counts = sessions.group_by("user_id").aggregate([("user_id", "count")])
    returning = counts.filter(pc.greater(counts["user_id_count"], 1))["user_id"]
    users = set(pc.unique(later["user_id"]).to_pylist()).intersection(returning.to_pylist())
    if len(users) < FEWEST_USERS:
        raise TrainingError(
            f"{len(users)} visitors came back among the latest {share:.0%} of {new:,} new sessions, too few to judge a "
            f"candidate: {FEWEST_USERS} are needed. Wait for more sessions before a refresh (REFRESH_SESSIONS)."
        )
    chosen = sorted(users, key=place_of)[:most_users]
    mine = sessions.filter(pc.is_in(sessions["user_id"], pa.array(chosen, sessions["user_id"].type)))
    return Holdout(sessions.filter(pc.less(sessions["end_ms"], cut_ms)), mine, cut_ms)
