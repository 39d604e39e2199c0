"""A tiny bundle, trained in seconds on the sessions of the tests' own shop: it need not be right, only real."""

from pathlib import Path

import pyarrow
import pyarrow.parquet

from streams.settings import Settings
from tests.oracle import Record, replay_log
from tests.traffic import Traffic


def make_bundle(directory: Path) -> Path:
    """Train below `directory` and return the bundle's path."""
    from trainer.fit import train
    from trainer.options import TrainOptions

    sessions = write_sessions(directory / "sessions")
    options = TrainOptions(
        clusters=2,
        layers=1,
        heads=1,
        hidden_size=16,
        epochs=1,
        fine_tune_epochs=1,
        rollouts=4,
        max_pages=8,
        device="cpu",
    )
    return train(sessions, directory / "bundle", options)


def write_sessions(directory: Path) -> Path:
    """The shop's sessions in the columns of the archive; returns the directory."""
    directory.mkdir(parents=True)
    settings = Settings(gap_ms=60_000, grace_ms=10_000, ahead_ms=600_000)
    sent = Traffic(seed=99, events=3_000, users=120, poison=0, late=0, wild=0).records(1, settings)
    log = [Record(0, offset, one.timestamp_ms, one.key, one.value) for offset, one in enumerate(sent)]
    found = sorted(replay_log(log, settings, ended=True).sessions)
    columns = {
        "user_id": [one.user for one in found],
        "session_id": [f"{one.user}-{one.number}" for one in found],
        "number": [one.number for one in found],
        "start_ms": [one.start_ms for one in found],
        "end_ms": [one.end_ms for one in found],
        "pages": [list(one.pages) for one in found],
        "page_ts_ms": [list(one.page_ts_ms) for one in found],
        "cart": [one.cart for one in found],
        "purchase": [one.purchase for one in found],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), directory / "sessions.parquet")
    return directory
