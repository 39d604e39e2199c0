"""Training of retrieval: a softmax over the candidates, with the best seed inside."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.items import indexed
from models.xpert import NEVER, XPert
from trainer.errors import TrainingError
from trainer.interactions import NONE, Cases, Task
from trainer.items import Space
from trainer.retrievers import Ranking, Retriever, Score, rank_by

CLIP = 1.0
AT_ONCE = 64  # cases ranked together: their scores fit the processor's cache


@dataclass(frozen=True)
class XPertOptions:
    """How an operator is trained. The scalars (temperature, prior, seed bias) have a step size of their own."""

    seeds: int = 10
    history: int = 16
    batch: int = 200
    lr: float = 1e-3
    scalar_lr: float = 0.02
    epochs: int = 8
    patience: int = 2
    candidates: int = 2000  # sampled for each batch where a snapshot has half as many more
    popularity_ms: int | None = None  # window of the prior's clicks; None: all
    seed: int = 0


@dataclass
class World:
    """What the examples of a task refer to: for each of its snapshots the vectors and the clicks of its items."""

    task: Task
    spaces: Sequence[Space]
    options: XPertOptions
    _slates: dict[int, "Slate"] = field(default_factory=dict)

    def slate(self, snapshot: int) -> "Slate":
        """The candidates of a snapshot."""
        if snapshot not in self._slates:
            clicks = self.task.known(snapshot, self.options.popularity_ms).popularity()
            self._slates[snapshot] = Slate.of(self.task.snapshots[snapshot].items, self.spaces[snapshot], clicks)
        return self._slates[snapshot]


@dataclass(frozen=True)
class Slate:
    """Candidates of one snapshot: `items` (M,), and what queries are multiplied with, `index` (M, D + 2)."""

    space: Space
    items: np.ndarray
    index: Tensor

    @classmethod
    def of(cls, items: np.ndarray, space: Space, clicks: np.ndarray) -> "Slate":
        """`clicks` (N,) of all items of the log. An item without a vector has zeros, and its clicks."""
        vectors = looked_up(space, items)[0].numpy()
        return cls(space, items, torch.from_numpy(indexed(vectors, np.log1p(clicks[items]))))


@dataclass(frozen=True)
class Batch:
    """B cases of one snapshot."""

    seeds: np.ndarray  # (B, S) int32, heaviest first, -1 for none
    history: np.ndarray  # (B, H) int32
    opens: Tensor  # (B,) bool
    seen: csr_array  # (B, N) bool
    targets: np.ndarray  # (B,) int32


def looked_up(space: Space, items: np.ndarray) -> tuple[Tensor, Tensor]:
    """Vectors of items, zeros for those without one, and which have one: (...) -> (..., D), (...) bool."""
    rows = space.rows(items)
    known = rows != NONE
    vectors = space.vectors[rows.clip(0)] * known[..., None]
    return torch.from_numpy(vectors), torch.from_numpy(known)


class Examples:
    """Cases as arrays, made once. A case's target is one of its labels that it has not seen and the index holds."""

    def __init__(self, cases: Cases, world: World) -> None:
        self.cases, self.world = cases, world
        self.seeds, self.seen = cases.recent(world.options.seeds), cases.seen()
        self.history = cases.recent(world.options.history)
        self.targets = cases.labels[cases.starts[:-1]]

    def batches(self, rng: np.random.Generator) -> Iterator[tuple["Slate", np.ndarray]]:
        """All rows once, shuffled; those of a batch share a snapshot."""
        parts = []
        for snapshot, rows in self.cases.by_snapshot():
            count = math.ceil(len(rows) / self.world.options.batch)
            parts += [(snapshot, part) for part in np.array_split(rng.permutation(rows), count)]
        for i in rng.permutation(len(parts)).tolist():
            yield self.world.slate(parts[i][0]), parts[i][1]

    def batch(self, rows: np.ndarray) -> Batch:
        """The cases `rows`."""
        opens = torch.from_numpy(self.cases.opens[rows])
        return Batch(self.seeds[rows], self.history[rows], opens, self.seen[rows], self.targets[rows])


def score(model: XPert, slate: Slate, batch: Batch, index: Tensor) -> tuple[Tensor, Tensor]:
    """Score and place of the best seed for some rows of the slate's index: (m, D + 2) -> (B, m) twice."""
    history, remembered = looked_up(slate.space, _trimmed(batch.history))
    seeds, known = looked_up(slate.space, _trimmed(batch.seeds))
    queries = model(seeds, known, model.user(history, remembered), batch.opens)
    top, place = (queries @ index.T).max(dim=1)  # (B, S, m) -> (B, m)
    return top, place


def _trimmed(items: np.ndarray) -> np.ndarray:
    """Without the columns at the end that are empty in every row; the first one stays."""
    kept: np.ndarray = items[:, : max(1, int((items != NONE).sum(axis=1).max()))]
    return kept


def softmax_loss(model: XPert, slate: Slate, batch: Batch, candidates: int, rng: np.random.Generator) -> Tensor:
    """Mean of -log P(target) among the candidates: all, or a uniform sample that stands for all."""
    size = len(slate.items)
    drawn = np.arange(size) if size <= 1.5 * candidates else rng.choice(size, candidates, replace=False)
    targets = np.searchsorted(slate.items, batch.targets)
    chosen = np.concatenate([drawn, targets])
    top, _ = score(model, slate, batch, slate.index[chosen])  # (B, n + B)
    own, others = top[:, len(drawn) :].diagonal(), top[:, : len(drawn)]
    never = batch.seen[:, slate.items[drawn]].toarray() | (drawn == targets[:, None])
    others = others.masked_fill(torch.from_numpy(never), NEVER)
    logits = torch.cat([own[:, None], others], dim=1) * model.log_temperature.exp()
    logits[:, 1:] += math.log(size / len(drawn))
    return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


def fit(model: XPert, train: Examples, validation: Cases, options: XPertOptions) -> list[float]:
    """Train in place and leave the epoch in it that was best on validation; returns R@10 + R@50 of each, start first.

    Raises TrainingError when the loss is no number.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    own = [model.seed_bias, model.prior, model.log_temperature]
    others = [one for one in model.parameters() if not any(one is scalar for scalar in own)]
    optimizer = torch.optim.Adam([{"params": others, "lr": options.lr}, {"params": own, "lr": options.scalar_lr}])
    judged = XPertRetriever("validation", model, train.world)
    found = [recall(judged, validation)]
    kept = copy.deepcopy(model.state_dict())
    for epoch in range(options.epochs):
        model.train()
        for slate, rows in train.batches(rng):
            loss = softmax_loss(model, slate, train.batch(rows), options.candidates, rng)
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"epoch {epoch}: the loss is {loss.item()}. Lower the learning rate ({options.lr})."
                )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, CLIP)
            optimizer.step()
        found.append(recall(judged, validation))
        if found[-1] == max(found):
            kept = copy.deepcopy(model.state_dict())
        elif epoch + 1 - int(np.argmax(found)) >= options.patience:
            break
    model.load_state_dict(kept)
    return found


@dataclass(frozen=True)
class XPertRetriever:
    """A trained operator as a Retriever."""

    name: str
    model: XPert
    world: World

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        self.model.eval()
        return rank_by(self._prepare, self.world.task, cases, k)

    def _prepare(self, snapshot: int) -> Score:
        slate = self.world.slate(snapshot)

        def scores(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
            examples = Examples(cases, self.world)
            found = np.empty((len(cases), len(slate.items)), dtype=np.float32)
            places = np.empty(found.shape, dtype=np.int64)
            by_length = np.argsort((examples.seeds != NONE).sum(axis=1), kind="stable")
            with torch.inference_mode():
                for rows in np.array_split(by_length, -(-len(cases) // AT_ONCE)):
                    top, place = score(self.model, slate, examples.batch(rows), slate.index)
                    found[rows], places[rows] = top.numpy(), place.numpy()
            return found, np.take_along_axis(examples.seeds, places, axis=1)

        return scores


def recall(retriever: Retriever, cases: Cases) -> float:
    """Recall@10 + Recall@50, means over the cases: what validation compares."""
    items = retriever.rank(cases, 50).items
    hits = np.take_along_axis(cases.truth().toarray(), items.clip(0).astype(np.int64), axis=1) & (items != NONE)
    shares = np.cumsum(hits, axis=1) / np.diff(cases.starts)[:, None]
    return float(shares[:, [9, 49]].mean(axis=0).sum())
