"""XPert's own training: a hinge loss with the most promising seed and the hardest negative (XPert, section 4)."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.xpert import XPert
from trainer.interactions import NONE, Cases
from trainer.retrieval_options import PaperOptions
from trainer.slates import Batch, Examples, Slate, World
from trainer.slots import Slots
from trainer.xpert import XPertRetriever, fit, queries_of


def hinge(
    seeds: Tensor, known: Tensor, positive: Tensor, negatives: Tensor, there: Tensor, margins: tuple[float, float]
) -> Tensor:
    """Mean of max(l+ - <psi(e*), a*>, 0) + max(<psi(e*), b*> - l-, 0); gradients flow through e* and b* alone.

    `seeds` (B, S, D) unit psi of each seed, `known` (B, S); `positive` (B, D) is a*; `negatives` (B, n, D), `there`
    (B, n). e* is the seed closest to a*, b* the negative closest to psi(e*); without a negative that term is 0.
    """
    near = torch.einsum("bsd,bd->bs", seeds, positive).masked_fill(~known, -torch.inf)
    best, place = near.max(dim=1)
    chosen = seeds[torch.arange(len(seeds)), place]  # (B, D)
    far = torch.einsum("bd,bnd->bn", chosen, negatives).masked_fill(~there, -torch.inf)
    pull, push = (margins[0] - best).clamp(min=0), (far.amax(dim=1) - margins[1]).clamp(min=0)
    return (pull + torch.where(there.any(dim=1), push, 0.0)).mean()


def global_negatives(cosines: Tensor, targets: Tensor, count: int, most_alike: float) -> tuple[Tensor, Tensor]:
    """The `count` items most similar to the target among those with a cosine of at most `most_alike` to it.

    `cosines` (B, M) of generic embeddings, `targets` (B,) -> places (B, n) and which are there (B, n). The other order,
    the nearest items first and the filter then, leaves nothing in a dense catalogue.
    """
    alike = cosines > most_alike
    alike[torch.arange(len(targets)), targets] = True
    allowed = cosines.masked_fill(alike, -torch.inf)
    top, places = allowed.topk(min(count, cosines.shape[1]), dim=1)
    return places, torch.isfinite(top)


def batch_negatives(
    cosines: Tensor, targets: Tensor, count: int, most_alike: float, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """`count` random targets of other cases of the batch, under the same filter; `cosines` (B, B) of the targets."""
    allowed = (cosines <= most_alike) & (targets[None, :] != targets[:, None])
    keys = torch.from_numpy(rng.random(cosines.shape)).masked_fill(~allowed, -1.0)
    top, places = keys.topk(min(count, len(targets)), dim=1)
    return targets[places], top >= 0


def hinge_loss(paper: PaperOptions) -> Callable[[XPert, Slate, Batch, np.random.Generator], Tensor]:
    """The loss of a batch of cases. Cases without a known seed teach nothing."""

    def loss(model: XPert, slate: Slate, batch: Batch, rng: np.random.Generator) -> Tensor:
        vectors = slate.vectors
        queries = queries_of(model, slate, batch)[:, :, :-2]
        known = torch.from_numpy(batch.seeds[:, : queries.shape[1]] != NONE)
        rows = known.any(dim=1)
        targets = torch.from_numpy(np.searchsorted(slate.items, batch.targets))[rows]
        if not len(targets):
            return queries.sum() * 0
        positive = vectors[targets]
        if paper.negatives_from == "all":
            found = global_negatives(positive @ vectors.T, targets, paper.negatives, paper.most_alike)
        else:
            found = batch_negatives(positive @ positive.T, targets, paper.negatives, paper.most_alike, rng)
        return hinge(queries[rows], known[rows], positive, vectors[found[0]], found[1], paper.margins)

    return loss


def published(world: World, paper: PaperOptions) -> World:
    """The same world for the model as published."""
    changes = {name: getattr(paper, name) for name in ("seeds", "policy", "history", "lr", "epochs")}
    return world.but(replace(world.options, **changes))


def fit_published(
    name: str, world: World, validation: Cases, paper: PaperOptions, note: Callable[[int, float], None]
) -> XPertRetriever:
    """XPert as published, with the epoch that was best on validation; `world` is `published`."""
    torch.manual_seed(world.options.seed)
    width = world.spaces[0].vectors.shape[1]
    model = XPert("personal", width, world.options.seeds, paper.heads, paper.activation, paper.feedforward)
    train = Examples(world.task.train, world)
    batches = train.batches_of_items if paper.batching == "items" else train.batches
    fit(model, train, validation, world.options, hinge_loss(paper), batches, note)
    return XPertRetriever(name, model, world, _slots(paper))


def without_morphs(name: str, world: World, paper: PaperOptions) -> XPertRetriever:
    """XPert as published, but the seeds ask as they are: nothing is trained; `world` is `published`."""
    return XPertRetriever(name, XPert("identity", world.spaces[0].vectors.shape[1], 1), world, _slots(paper))


def _slots(paper: PaperOptions) -> Slots:
    return Slots(paper.merge, paper.quotas, paper.quota_power, paper.refill)
