"""Training of retrieval: a softmax over the candidates, with the best seed inside; and what it ranks."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.xpert import NEVER, XPert
from trainer.errors import TrainingError
from trainer.interactions import NONE, Cases
from trainer.retrieval_metrics import strength, strengths
from trainer.retrieval_options import XPertOptions
from trainer.retrievers import BATCH, Ranking, Score, best, rank_by
from trainer.slates import Batch, Examples, Slate, World, looked_up, trimmed
from trainer.slots import Slots

CLIP = 1.0
AT_ONCE = 64  # cases ranked together: their scores fit the processor's cache
# Weights of the prior that validation tries beside the learned one; the last leaves nothing but popularity.
PRIORS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 3.0, 100.0)

Loss = Callable[[XPert, Slate, Batch, np.random.Generator], Tensor]
Batches = Iterator[tuple[Slate, np.ndarray]]


def queries_of(model: XPert, slate: Slate, batch: Batch) -> Tensor:
    """A query for each seed of each case: (B, S, D + 2)."""
    history, remembered = looked_up(slate.space, trimmed(batch.history))
    seeds, known = looked_up(slate.space, trimmed(batch.seeds))
    queries: Tensor = model(seeds, known, model.user(history, remembered), batch.opens)
    return queries


def softmax_loss(options: XPertOptions) -> Loss:
    """Mean of -log P(target) among the candidates: all, or a uniform sample that stands for all."""

    def loss(model: XPert, slate: Slate, batch: Batch, rng: np.random.Generator) -> Tensor:
        size = len(slate.items)
        wanted = options.candidates
        drawn = np.arange(size) if size <= 1.5 * wanted else rng.choice(size, wanted, replace=False)
        targets = np.searchsorted(slate.items, batch.targets)
        queries = queries_of(model, slate, batch)
        others = (queries @ slate.index[drawn].T).amax(dim=1)  # (B, S, n) -> (B, n)
        own = torch.einsum("bsd,bd->bs", queries, slate.index[targets]).amax(dim=1)
        never = batch.seen[:, slate.items[drawn]].toarray() | (drawn == targets[:, None])
        others = others.masked_fill(torch.from_numpy(never), NEVER)
        logits = torch.cat([own[:, None], others], dim=1) * model.log_temperature.exp()
        logits[:, 1:] += math.log(size / len(drawn))
        return cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))

    return loss


def fit(
    model: XPert,
    train: Examples,
    validation: Cases,
    options: XPertOptions,
    loss: Loss | None = None,
    batches: Callable[[np.random.Generator], Batches] | None = None,
    note: Callable[[int, float], None] = lambda epoch, found: None,
) -> list[float]:
    """Train in place and leave the epoch in it that was best on validation; returns R@10 + R@50 of each, start first.

    `note` hears each epoch's. Raises TrainingError when the loss is no number.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    loss, batches = loss or softmax_loss(options), batches or train.batches
    own = [model.seed_bias, model.prior, model.log_temperature]
    others = [one for one in model.parameters() if not any(one is scalar for scalar in own)]
    groups = [{"params": others, "lr": options.lr}, {"params": own, "lr": options.scalar_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    judged = XPertRetriever("validation", model, train.world)
    found = [strength(judged.rank(validation, 50), validation)]
    kept = copy.deepcopy(model.state_dict())
    for epoch in range(options.epochs):
        model.train()
        for slate, rows in batches(rng):
            value = loss(model, slate, train.batch(rows), rng)
            if not torch.isfinite(value):
                raise TrainingError(
                    f"epoch {epoch}: the loss is {value.item()}. Lower the learning rate ({options.lr})."
                )
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(others, CLIP)
            optimizer.step()
        found.append(strength(judged.rank(validation, 50), validation))
        note(epoch, found[-1])
        if found[-1] == max(found):
            kept = copy.deepcopy(model.state_dict())
        elif epoch + 1 - int(np.argmax(found)) >= options.patience:
            break
    model.load_state_dict(kept)
    return found


def tune_prior(model: XPert, world: World, validation: Cases) -> None:
    """Set the prior's weights, within sessions and for first clicks, to what ranks the validation cases well.

    Of `PRIORS` and the learned weight the largest is taken that is within a standard error of the best: validation
    covers little time, and what is popular is popular with everybody.
    """
    weights = np.array([[float("nan"), *PRIORS]] * 2)  # (2, W)
    weights[:, 0] = model.prior.tolist()
    with torch.no_grad():
        model.prior.zero_()
    found = _by_prior(XPertRetriever("", model, world), validation, weights)
    for place, rows in enumerate((~validation.opens, validation.opens)):
        chosen = weights[place, 0]
        if rows.any():
            here = found[rows]
            behind = here[:, [int(here.mean(axis=0).argmax())]] - here
            error = behind.std(axis=0) / np.sqrt(len(here))
            chosen = weights[place, behind.mean(axis=0) <= error].max()
        with torch.no_grad():
            model.prior[place] = chosen


def _by_prior(without: "XPertRetriever", cases: Cases, weights: np.ndarray) -> np.ndarray:
    """Recall@10 + Recall@50 of each case with each weight of the prior, (2, W) -> (C, W); `without` has none."""
    found = np.empty((len(cases), weights.shape[1]))
    for snapshot, rows in cases.by_snapshot():
        slate, score = without.world.slate(snapshot), without.prepare(snapshot, 50)
        log_clicks = slate.index[:, -2].numpy()
        for part in np.array_split(rows, -(-len(rows) // BATCH)):
            some = cases.take(part)
            masked = np.where(some.seen()[:, slate.items].toarray(), -np.inf, score(some)[0])
            for place, weight in enumerate(weights.T):
                prior = weight[some.opens.astype(int)][:, None] * log_clicks
                found[part, place] = strengths(best(masked + prior.astype(np.float32), slate.items, 50), some)
    return found


@dataclass(frozen=True)
class XPertRetriever:
    """A trained operator as a Retriever. Without `slots` the highest score over the seeds counts."""

    name: str
    model: XPert
    world: World
    slots: Slots | None = None

    def rank(self, cases: Cases, k: int) -> Ranking:
        """See Retriever."""
        self.model.eval()
        return rank_by(lambda snapshot: self.prepare(snapshot, k), self.world.task, cases, k)

    def prepare(self, snapshot: int, k: int) -> Score:
        """What scores cases of a snapshot, for lists of k."""
        slate = self.world.slate(snapshot)

        def scores(cases: Cases) -> tuple[np.ndarray, np.ndarray]:
            examples = Examples(cases, self.world)
            found = np.empty((len(cases), len(slate.items)), dtype=np.float32)
            places = np.empty(found.shape, dtype=np.int64)
            by_length = np.argsort((examples.seeds != NONE).sum(axis=1), kind="stable")
            with torch.inference_mode():
                for rows in np.array_split(by_length, -(-len(cases) // AT_ONCE)):
                    batch = examples.batch(rows)
                    each = queries_of(self.model, slate, batch) @ slate.index.T  # (B, S, M)
                    top, place = each.max(dim=1)
                    found[rows] = top.numpy() if self.slots is None else self._dealt(each, slate, batch, k)
                    places[rows] = place.numpy()
            return found, np.take_along_axis(examples.seeds, places, axis=1)

        return scores

    def _dealt(self, each: Tensor, slate: Slate, batch: Batch, k: int) -> np.ndarray:
        assert self.slots is not None
        seen = batch.seen[:, slate.items].toarray()[:, None]
        weights = batch.weights[:, : each.shape[1]]
        return self.slots.deal(np.where(seen, -np.inf, each.numpy()), weights, k)
