"""A tiny shop whose visitors have habits, as session files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trainer.options import TrainOptions
from trainer.paper import PaperOptions

# The machine is shared; and sums over several threads do not repeat exactly.
torch.set_num_threads(1)

TOPICS = {"shoes": ["shoes", "boots", "sandals"], "music": ["guitar", "drums", "piano"]}
TINY: dict[str, Any] = {
    "hidden_size": 16, "heads": 2, "layers": 1, "clusters": 2, "epochs": 2, "fine_tune_epochs": 1, "batch": 32,
    "context_tokens": 64, "rollouts": 8, "max_pages": 8, "validation_share": 0.2, "checkpoint_steps": 2,
    "device": "cpu",
}  # fmt: skip

# Every way to a bundle. The embeddings of texts come from the sentence encoder, which takes its time.
MODES: dict[str, dict[str, Any]] = {
    "token": {"mode": "behaviour", "backend": "token"},
    "separate": {"mode": "behaviour", "backend": "separate"},
    "lora": {"mode": "behaviour", "backend": "lora", "soft": True},
    "kmeans": {"mode": "kmeans", "backend": "separate"},
    "paper": {"mode": "paper", "paper": PaperOptions(embedding="pages", epochs=2, batch=32, predictor_lr=1e-3)},
}


def shop(users: int, seed: int = 0, marked: bool = True) -> list[dict[str, Any]]:
    """Sessions of `users` visitors who like shoes or music. `marked`: cart and purchase have pages of their own."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for user in range(users):
        pages = TOPICS["shoes" if user % 3 else "music"]
        start = 1_700_000_000_000 + user * 1_000
        for number in range(1, int(rng.integers(1, 6)) + 1):
            seen = ["home", *rng.choice(pages, size=int(rng.integers(1, 5))).tolist()]
            cart = bool(rng.random() < (0.6 if user % 2 else 0.2))
            purchase = cart and bool(rng.random() < 0.4)
            if marked:
                seen += ["basket"] * cart + ["thank you"] * purchase
            elif cart:
                seen += [pages[0]]
            times = [start + 20_000 * i for i in range(len(seen))]
            rows.append(
                {
                    "user_id": f"u{user:04d}", "session_id": f"u{user:04d}-{number}", "number": number,
                    "start_ms": times[0], "end_ms": times[-1], "pages": seen, "page_ts_ms": times,
                    "cart": cart, "purchase": purchase,
                }
            )  # fmt: skip
            start += 86_400_000
    return rows


def write(rows: list[dict[str, Any]], directory: Path, files: int = 2) -> Path:
    """Sessions in several files, in no order, in a directory of their own."""
    order = np.random.default_rng(1).permutation(len(rows))
    for i in range(files):
        part = directory / f"part={i}"
        part.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist([rows[j] for j in order[i::files]]), part / "sessions.parquet")
    return directory


@pytest.fixture(scope="session")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Session files of 120 visitors."""
    return write(shop(120), tmp_path_factory.mktemp("sessions"))


@pytest.fixture(scope="session")
def options() -> Callable[..., TrainOptions]:
    """Tiny options, with changes."""
    return lambda **changes: TrainOptions(**{**TINY, **changes})
