"""SASRec (Kang and McAuley, ICDM 2018): the next item by self-attention over the clicks, from an own item table."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.errors import TooFewClicks
from trainer.interactions import Cases, Interactions, Task
from trainer.retrieval_metrics import strength
from trainer.retrievers import Ranking, Score, rank_by


@dataclass(frozen=True)
class SASRecOptions:
    """Sizes and rates; the loss is a softmax over the batch's items and as many drawn ones as `negatives`."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    length: int = 32  # clicks that are looked at
    dropout: float = 0.3
    batch: int = 256  # users
    lr: float = 4e-3
    epochs: int = 60
    patience: int = 8  # epochs without a better validation: the first ten or so learn no more than popularity
    negatives: int = 4_000
    seed: int = 0


class Network(nn.Module):
    """Rows of item numbers from 1, 0 where there is none; a row's last place is its newest click."""

    def __init__(self, items: int, options: SASRecOptions) -> None:
        super().__init__()
        self.table = nn.Embedding(items + 1, options.width, padding_idx=0)
        self.places = nn.Embedding(options.length, options.width)
        layer = nn.TransformerEncoderLayer(
            options.width, options.heads, 4 * options.width, options.dropout, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(
            layer, options.layers, nn.LayerNorm(options.width), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(options.dropout)
        nn.init.normal_(self.table.weight, std=options.width**-0.5)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        """(B, T) -> (B, T, D): what is expected after each click."""
        length = rows.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=rows.device).triu(1)
        taken = self.dropout(self.table(rows) + self.places.weight[-length:])
        found: Tensor = self.encoder(taken, mask=later)
        return found


@dataclass(frozen=True)
class SASRec:
    """A trained network as a Retriever; it knows the items that it was trained with, and no new ones."""

    task: Task
    model: Network
    options: SASRecOptions
    name: str = "SASRec"

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        return rank_by(self._prepare, self.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        vectors = self.model.table.weight[torch.from_numpy(self.task.snapshots[snapshot].items).long() + 1]

        def score(cases: Cases) -> tuple[np.ndarray, None]:
            rows = np.zeros((len(cases), self.options.length), dtype=np.int64)
            for row in range(len(cases)):
                history = cases.history(row, self.options.length)
                rows[row, self.options.length - len(history) :] = history + 1
            self.model.eval()
            with torch.inference_mode():
                return (self.model(torch.from_numpy(rows))[:, -1] @ vectors.T).numpy(), None

        return score


def fit_sasrec(
    task: Task, options: SASRecOptions, note: Callable[[int, float], None] = lambda epoch, found: None
) -> SASRec:
    """Fit on all that validation's first snapshot knows: later ones know labels of validation.

    The epoch of the best validation Recall@10 + @50 is kept. Raises TooFewClicks.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    rows = _rows(task.known(int(task.validation.snapshot.min())), options.length)
    model = Network(len(task.log.items), options)
    found = SASRec(task, model, options)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, betas=(0.9, 0.98))
    kept, best, waited = copy.deepcopy(model.state_dict()), -1.0, 0
    for epoch in range(options.epochs):
        model.train()
        for part in _batches(rows, options.batch, rng):
            drawn = torch.from_numpy(rng.integers(1, len(task.log.items) + 1, options.negatives))
            loss = _loss(model, torch.from_numpy(part), drawn)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        value = strength(found.rank(task.validation, 50), task.validation)
        note(epoch, value)
        if value > best:
            kept, best, waited = copy.deepcopy(model.state_dict()), value, 0
        else:
            waited += 1
            if waited > options.patience:
                break
    model.load_state_dict(kept)
    return found


def _loss(model: Network, rows: Tensor, drawn: Tensor) -> Tensor:
    """Mean of -log P(next) over all clicks but the first, among the items of the batch and the drawn ones."""
    states, targets = model(rows[:, :-1]), rows[:, 1:]
    real = (targets > 0) & (rows[:, :-1] > 0)
    items, places = torch.unique(torch.cat([targets[real], drawn]), return_inverse=True)
    logits = states[real] @ model.table(items).T
    return cross_entropy(logits, places[: int(real.sum())])


def _batches(rows: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Rows of about the same length together, without the places that none of them fills; in any order."""
    lengths = (rows > 0).sum(axis=1)
    parts = np.array_split(np.lexsort((rng.random(len(rows)), lengths)), -(-len(rows) // size))
    for place in rng.permutation(len(parts)).tolist():
        yield rows[parts[place], -int(lengths[parts[place]].max()) :]


def _rows(log: Interactions, length: int) -> np.ndarray:
    """(rows, length + 1) int64: each user's last clicks, from 1; users with fewer than two teach nothing."""
    found = []
    for start, end in zip(log.first[:-1].tolist(), log.first[1:].tolist(), strict=True):
        if end - start >= 2:
            clicked = log.item[max(start, end - length - 1) : end]
            row = np.zeros(length + 1, dtype=np.int64)
            row[length + 1 - len(clicked) :] = clicked + 1
            found.append(row)
    if not found:
        raise TooFewClicks("SASRec learns from visitors with two clicks or more, and there are none. Leave it out.")
    return np.stack(found)
