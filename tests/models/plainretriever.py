"""The obvious retriever: every score of every item in plain numpy, one sort over all of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from models.items import ItemTable
from models.popularity import BUCKETS
from models.retriever import operator_of
from models.visit import Interest


@dataclass
class PlainRetriever:
    """All items that are known and available; `vectors` of those that have one, and every click there was."""

    table: ItemTable
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    available: dict[str, bool] = field(default_factory=dict)  # in the order of the real one's rows
    clicks: list[tuple[str, int]] = field(default_factory=list)
    began: int = 0  # newest click when the first ones were counted
    newest: int = -1

    def __post_init__(self) -> None:
        self.vectors = dict(zip(self.table.ids, self.table.vectors, strict=True))
        self.available = dict.fromkeys(self.table.ids, True)

    def log_clicks(self, item_id: str) -> float:
        """Of the clicks in the window, and of the table's own as far as they have not faded."""
        chosen, row = self.table.retriever, self.table.row(item_id)
        own = 0.0 if row is None else float(self.table.clicks[row])
        count = sum(one == item_id and self.counts(ts) for one, ts in self.clicks)
        if self.newest < 0:
            return float(np.log1p(own))
        began = self.began if chosen.clicks_until_ms is None else chosen.clicks_until_ms
        fading = (self.newest - began) * BUCKETS // chosen.window_ms / BUCKETS
        return float(np.log1p(own * min(1.0, max(0.0, 1.0 - fading)) + count))

    def counts(self, ts_ms: int) -> bool:
        """Whether a click at that time is in the window now."""
        step, since = max(1, self.table.retriever.window_ms // BUCKETS), self.table.retriever.clicks_until_ms
        return ts_ms // step > self.newest // step - BUCKETS and (since is None or ts_ms > since)

    def scores(self, interest: Interest, seeds: list[str]) -> dict[str, tuple[float, str | None]]:
        """Score and seed of each item that may be in the list."""
        chosen = self.table.retriever
        seeds = [seed for seed in seeds if seed in self.vectors]
        popularity = {item_id: self.log_clicks(item_id) for item_id in self.available}
        touched = {*interest.session, *interest.recent, *interest.bought, *(one[0] for one in interest.seeds)}
        candidates = [item_id for item_id, there in self.available.items() if there and item_id not in touched]
        if chosen.ranker == "counts":
            return {item_id: self._counted(item_id, interest, popularity[item_id]) for item_id in candidates}
        if chosen.ranker == "popularity" or not seeds:
            return {item_id: (popularity[item_id], None) for item_id in candidates}
        queries = self.queries(interest, seeds)
        found: dict[str, tuple[float, str | None]] = {}
        for item_id in candidates:
            vector = self.vectors.get(item_id, np.zeros(self.table.vectors.shape[1]))
            each = [float(query @ np.array([*vector, popularity[item_id], 1.0])) for query in queries]
            best = int(np.argmax(each))
            found[item_id] = each[best], seeds[best] if item_id in self.vectors else None
        return found

    def queries(self, interest: Interest, seeds: list[str]) -> np.ndarray:
        """(S, D + 2), one visitor at a time and nothing padded."""
        operator = operator_of(self.table.retriever, self.table.tensors)
        history = [item for item in interest.recent[: self.table.retriever.history] if item in self.available]
        past = [self.vectors[item] for item in history if item in self.vectors]
        with torch.inference_mode():
            z = None
            if operator.aggregation is not None:
                z = torch.zeros(1, 64)
                if past:
                    z = operator.user(torch.tensor(np.stack(past)[None]), torch.ones(1, len(past), dtype=torch.bool))
            vectors = torch.tensor(np.stack([self.vectors[seed] for seed in seeds])[None])
            asked: np.ndarray = operator(
                vectors, torch.ones(1, len(seeds), dtype=torch.bool), z, torch.tensor([True])
            ).numpy()
        first: np.ndarray = asked[0]
        return first

    def _counted(self, item_id: str, interest: Interest, popularity: float) -> tuple[float, str | None]:
        chosen, tensors, row = self.table.retriever, self.table.tensors, self.table.row(item_id)
        parts: list[tuple[float, str]] = []
        for place, seed in enumerate(interest.recent[: chosen.counts_seeds]):
            if self.table.row(seed) is None:
                continue
            start, end = tensors["covisits_indptr"][self.table.rows([seed])[0] :][:2]
            counts: Mapping[int, float] = dict(
                zip(tensors["covisits_indices"][start:end].tolist(), tensors["covisits_values"][start:end], strict=True)
            )
            clicks = max(float(self.table.clicks[self.table.rows([seed])[0]]), 1.0)
            part = chosen.counts_fade**place * counts.get(-1 if row is None else row, 0.0) / clicks**chosen.counts_power
            parts.append((float(part), seed))
        best = max(parts, default=(0.0, ""), key=lambda one: one[0])
        return sum(part for part, _ in parts) + 1e-6 * popularity, best[1] if best[0] > 0 else None
