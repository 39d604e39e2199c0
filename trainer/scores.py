"""One predictor's rows as numbers, and every figure that follows from them under any weighting of the users."""

from collections.abc import Mapping, Sequence

import numpy as np

from models.metrics import Cases, Pages, auc, average_precision, calibration_error, log_loss, page_scores, worst_share
from trainer.measures import DECODINGS, MEASURES, OUTCOMES, PAGE_SCORES, VARIED
from trainer.rows import Rows
from trainer.textmetrics import bleu, bleu_counts

LABELS = (*OUTCOMES, "union")
# Ranked by these, more is better or less is.
WORST = {"iou": 1.0, "path_iou": 1.0, "nll_per_token": -1.0, "cart_log_loss": -1.0, "purchase_log_loss": -1.0}


class Scores:
    """The N users of one predictor as numbers: sums for most figures, single values for those that need ranks."""

    def __init__(
        self,
        rows: Rows,
        thresholds: tuple[float, float],
        outcome_pages: Mapping[str, Sequence[str]],
        bert: np.ndarray | None = None,
    ) -> None:
        """The columns that the rows allow: none of paths where all paths are empty, nor of NLL where one is null.

        `bert` (n, 3): BERTScore precision, recall and F1 of the first n users; the others have no weight in them.
        """
        self.users = len(rows)
        self.columns: dict[str, np.ndarray] = {}  # (N,) each, summed
        self.values: dict[str, np.ndarray] = {}  # (N,) each, ranked
        self.bleu_counts: np.ndarray | None = None
        self.happened = {name: np.array([row[name] for row in rows], dtype=float) for name in OUTCOMES}
        self.happened["union"] = np.maximum(*(self.happened[name] for name in OUTCOMES))
        codes: dict[str, int] = {}
        target = _coded([row["target"] for row in rows], codes)
        seen = _coded([[page for pages in row["input"] for page in pages] for row in rows], codes)
        for prefix, column in DECODINGS.items():
            if any(row[column] for row in rows):
                predicted = _coded([row[column] for row in rows], codes)
                self._add_pages(prefix, page_scores(target, predicted, seen, self.users))
                if prefix:
                    again = page_scores(target, predicted, seen, self.users, multiset=True)
                    self.columns |= {f"{prefix}{name}_multiset": again[name] for name in VARIED if name != "hr"}
        if "path_iou" in self.columns:
            self.bleu_counts = bleu_counts([(row["target"], row["path"]) for row in rows])
            if all(outcome_pages[name] for name in OUTCOMES):
                held = [
                    [float(not set(row["path"]).isdisjoint(outcome_pages[name])) for row in rows] for name in OUTCOMES
                ]
                self._add_decisions("path_", np.array(held))
        if all(row["cart_p"] is not None and row["purchase_p"] is not None for row in rows):
            self._add_probabilities(rows, thresholds)
        if all(row["nll"] is not None for row in rows):
            self.columns["nll"] = np.array([row["nll"] for row in rows])
            self.columns["tokens"] = np.array([row["tokens"] for row in rows], dtype=float)
            self.values["nll_per_token"] = self.columns["nll"] / self.columns["tokens"]
        if bert is not None:
            self._add_bert(bert)
        self._names = list(self.columns)
        self._sums = np.stack([self.columns[name] for name in self._names], axis=1)

    def measure(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Every figure under R weightings of the users, (R, N) -> (R,) each; NaN where it is undefined."""
        sums = dict(zip(self._names, (weights @ self._sums).T, strict=True))
        users = weights.sum(axis=1)
        found = {name: sums[name] / users for name in self._names if name in MEASURES}
        for prefix in DECODINGS:
            for name in VARIED:
                if prefix + name in sums:
                    square = sums[f"{prefix}{name}_squared"] / users
                    found[f"{prefix}{name}_var"] = np.maximum(square - found[prefix + name] ** 2, 0.0)
            if f"{prefix}cart_right" in sums:
                found |= _decided(prefix, sums, users)
        if self.bleu_counts is not None:
            found["path_bleu"] = bleu(weights @ self.bleu_counts)
        if "nll" in sums:
            found["nll_per_token"] = sums["nll"] / sums["tokens"]
        if "bert_users" in sums:
            covered = np.maximum(sums["bert_users"], 1.0)
            found |= {name: sums[name] / covered for name in self._names if name.startswith("path_bert_")}
        return found | self._ranked(weights)

    def _ranked(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        found = {}
        for name in OUTCOMES:
            if name in self.values:
                cases = Cases.of(self.values[name], self.happened[name], weights)
                found[f"{name}_auc"] = auc(cases)
                found[f"{name}_average_precision"] = average_precision(cases)
                found[f"{name}_calibration_error"] = calibration_error(cases)
        for name, sign in WORST.items():
            if name in self.values:
                found[f"{name}_worst_decile"] = sign * worst_share(sign * self.values[name], weights)
        return found

    def _add_pages(self, prefix: str, scores: dict[str, np.ndarray]) -> None:
        self.columns |= {prefix + name: scores[name] for name in PAGE_SCORES}
        self.columns |= {f"{prefix}{name}_squared": scores[name] ** 2 for name in VARIED}
        self.values[f"{prefix}iou"] = scores["iou"]

    def _add_bert(self, scores: np.ndarray) -> None:
        padded = np.zeros((self.users, 4))
        padded[: len(scores)] = np.hstack([scores, np.ones((len(scores), 1))])
        names = ("path_bert_precision", "path_bert_recall", "path_bert_f1", "bert_users")
        self.columns |= dict(zip(names, padded.T, strict=True))

    def _add_probabilities(self, rows: Rows, thresholds: tuple[float, float]) -> None:
        for name in OUTCOMES:
            self.values[name] = np.array([row[f"{name}_p"] for row in rows])
            losses = [log_loss(row[f"{name}_p"], row[name]) for row in rows]
            self.columns[f"{name}_log_loss"] = self.values[f"{name}_log_loss"] = np.array(losses)
        said = [self.values[name] >= threshold for name, threshold in zip(OUTCOMES, thresholds, strict=True)]
        self._add_decisions("", np.array(said, dtype=float))

    def _add_decisions(self, prefix: str, said: np.ndarray) -> None:
        """`said` (2, N): whether a cart and a purchase were predicted."""
        decisions = dict(zip(LABELS, (*said, said.max(axis=0)), strict=True))
        for name, decided in decisions.items():
            self.columns[f"{prefix}{name}_right"] = (decided == self.happened[name]).astype(float)
            self.columns[f"{prefix}{name}_hit"] = decided * self.happened[name]
            self.columns[f"{prefix}{name}_said"] = decided
            self.columns[f"{prefix}{name}_came"] = self.happened[name]
        right = [self.columns[f"{prefix}{name}_right"] for name in OUTCOMES]
        self.columns[f"{prefix}acc_either"] = np.maximum(*right)


def _decided(prefix: str, sums: Mapping[str, np.ndarray], users: np.ndarray) -> dict[str, np.ndarray]:
    found = {}
    for name in LABELS:
        hit, said, came = (sums[f"{prefix}{name}_{kind}"] for kind in ("hit", "said", "came"))
        found[f"{prefix}{name}_accuracy"] = sums[f"{prefix}{name}_right"] / users
        found[f"{prefix}{name}_recall"] = hit / np.maximum(came, 1.0)
        found[f"{prefix}{name}_precision"] = hit / np.maximum(said, 1.0)
    found[f"{prefix}union_f1"] = 2 * hit / np.maximum(said + came, 1.0)
    return found


def _coded(lists: Sequence[Sequence[str]], codes: dict[str, int]) -> Pages:
    flat = [codes.setdefault(page, len(codes)) for pages in lists for page in pages]
    users = np.repeat(np.arange(len(lists)), [len(pages) for pages in lists])
    return Pages(np.array(flat, dtype=np.int64), users)
