"""The items of a bundle: what validation chose, fitted, as the files that a worker retrieves with."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from scipy.sparse import csr_array

from models.encoder import WIDTH as TEXT_WIDTH
from models.encoder import Encoder
from models.items import WEIGHTS, ItemsFile, RetrieverConfig, SeedRule, nearest_clusters
from models.xpert import Morph
from streams.wire import Item
from trainer.corpus import VALIDATION
from trainer.errors import TooFewClicks, TrainingError
from trainer.fusion import CONSTANT, Fused
from trainer.hinge import fit_published, published
from trainer.interactions import Interactions
from trainer.items import Space, click_space, global_centroids, text_map
from trainer.options import XPERT_PUBLISHED
from trainer.protocols import HOUR_MS
from trainer.retrieval_baselines import Counts
from trainer.retrieval_choice import Candidate, choose
from trainer.retrieval_contenders import best_counts, best_popularity
from trainer.retrieval_metrics import strength
from trainer.retrieval_options import PaperOptions, XPertOptions
from trainer.sessionitems import NextSessions
from trainer.slates import World
from trainer.spaces import choose_spaces
from trainer.xpert import XPertRetriever

WINDOWS_MS = tuple(hours * HOUR_MS for hours in (1, 6, 24, 72, 168))
FEWEST = 20  # cases to train on, and to validate with

Note = Callable[[str], None]


@dataclass(frozen=True)
class FittedItems:
    """What `save_bundle` takes as `items`, and what the model card says of it."""

    file: ItemsFile
    tensors: Mapping[str, np.ndarray]
    told: str
    validation: dict[str, float]  # Recall@10 + Recall@50 of what validation chose among

    @property
    def pair(self) -> tuple[ItemsFile, Mapping[str, np.ndarray]]:
        """As `save_bundle` takes it."""
        return self.file, self.tensors


def fit_items(
    log: Interactions, options: XPertOptions, texts: np.ndarray | None = None, note: Note = lambda what: None
) -> FittedItems:
    """Fit retrievers to a log with times, and take the one that validation chooses. Raises TooFewClicks.

    `texts` (N, 384): embeddings of the items' texts, zeros where there is none.
    """
    windows = WINDOWS_MS if options.popularity_ms is None else (options.popularity_ms,)
    told = np.zeros(len(log.items), dtype=bool) if texts is None else np.abs(texts).sum(axis=1) > 0
    task = NextSessions(every_ms=min(windows), seed=options.seed).task(log)
    task = replace(task, content=texts if told.any() else None)
    if min(len(task.train), len(task.validation)) < FEWEST:
        raise TooFewClicks(
            f"In {len(task.train)} sessions to learn from, and {len(task.validation)} to validate on, visitors came "
            f"back to an item that was new to them and known before; {FEWEST} of each are needed. Give more sessions."
        )
    spaces, _ = choose_spaces(task, options, note)
    popularity = best_popularity(task, windows)
    counts = best_counts(task, WINDOWS_MS)
    window_ms = popularity.span or HOUR_MS
    world = World(task, spaces.of, replace(options, popularity_ms=window_ms))
    if options.mode == "paper":
        chosen, validation = _as_published(world, note)
    else:
        choice = choose(world, popularity, counts, note)
        chosen, validation = choice.chosen, {one.retriever.name: one.found for one in choice.candidates}
    until = int(log.ts.max()) + 1
    clicked = log if options.space_ms is None else log.between(until - options.space_ms, until)
    space = spaces.newest(click_space(clicked, options.seed))
    operator = _operator(chosen)
    config = _config(chosen, operator, counts, window_ms, int(log.ts.max()), world.options)
    tensors = _tensors(log, space, window_ms, options)
    placed = told[space.items]
    if texts is not None and placed.any():
        tensors["text_map"] = text_map(texts[space.items[placed]], space.vectors[placed])
    if operator is not None and config.ranker != "nearest":
        tensors |= {WEIGHTS + name: one.numpy() for name, one in operator.model.state_dict().items()}
    if config.fused or config.ranker == "counts":
        tensors |= _covisits(log, counts, space.items)
    file = ItemsFile([log.items[item] for item in space.items.tolist()], config)
    words = "" if texts is None else f", {int(placed.sum()):,} of them with a text"
    card = (
        f"{len(file.ids):,} items by {spaces.name}{words}; {chosen.retriever.name}, with a Recall@10 + Recall@50 of "
        f"{chosen.found:.3f} on {len(task.validation):,} later sessions; the index held "
        f"{task.coverage[VALIDATION]:.1%} of what was new to their visitors"
    )
    return FittedItems(file, tensors, card, validation)


def embed_texts(items: list[str], texts: Mapping[str, str], encoder: Path | None, device: str) -> np.ndarray:
    """Embeddings of the items' texts, (N, 384); zeros where there is none. Raises EncoderMissing."""
    places = [place for place, item in enumerate(items) if texts.get(item)]
    found = np.zeros((len(items), TEXT_WIDTH), dtype=np.float32)
    if places:
        found[places] = Encoder(encoder, device).encode([texts[items[place]] for place in places])
    return found


def read_texts(catalogue: Path) -> dict[str, str]:
    """What each item of a file (JSON lines, as in the topic `items`) says of itself: its text and its category.

    Raises TrainingError that names the line.
    """
    found: dict[str, str] = {}
    try:
        with catalogue.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        item = msgspec.json.decode(line, type=Item)
                    except msgspec.MsgspecError as error:
                        raise TrainingError(
                            f'{catalogue}, line {number}: no item ({error}). Give {{"item_id": "1", "text": "..."}}.'
                        ) from None
                    found[item.item_id] = item.description
    except OSError as error:
        raise TrainingError(
            f"{catalogue} cannot be read ({error.strerror}). Give --items a file of JSON lines, as `browsecast items "
            "publish` takes it."
        ) from None
    return found


def _as_published(world: World, note: Note) -> tuple[Candidate, dict[str, float]]:
    """The paper's model, with the options' seeds, history and so on; what these cannot say is as published.

    A worker takes the highest score of an item over the seeds, and deals no quotas.
    """
    paper = replace(PaperOptions(), **{name: getattr(world.options, name) for name in XPERT_PUBLISHED})
    name = "XPert as published"
    fitted = fit_published(
        name, published(world, paper), world.task.validation, paper, lambda e, _: note(f"{name}, epoch {e + 1}")
    )
    best = replace(fitted, slots=None)
    found = strength(best.rank(world.task.validation, 50), world.task.validation)
    return Candidate("personal", best, found), {name: found}


def _operator(chosen: Candidate) -> XPertRetriever | None:
    retriever = chosen.retriever.first if isinstance(chosen.retriever, Fused) else chosen.retriever
    return retriever if isinstance(retriever, XPertRetriever) else None


def _config(
    chosen: Candidate,
    operator: XPertRetriever | None,
    counts: Counts,
    window_ms: int,
    until_ms: int,
    options: XPertOptions,
) -> RetrieverConfig:
    trained = options if operator is None else operator.world.options
    config = RetrieverConfig(
        ranker=chosen.ranker,
        seeding=SeedRule(trained.policy, trained.seeds, trained.gamma, trained.protect),
        fused=chosen.fused,
        fusion=int(CONSTANT),
        counts_seeds=counts.seeds,
        counts_fade=counts.fade,
        counts_power=counts.power,
        window_ms=window_ms,
        clicks_until_ms=until_ms,
        history=trained.history,
    )
    if operator is None:
        return config
    model = operator.model
    prior = float(model.prior[1].detach())  # a prediction always asks for the first click of a session
    morph = model.change if isinstance(model.change, Morph) else None
    return msgspec.structs.replace(
        config,
        prior=(prior, prior),
        seed_bias=tuple(float(one) for one in model.seed_bias.detach()),
        heads=morph.heads if morph else 1,
        activation=morph.activation if morph else "identity",
    )


def _tensors(log: Interactions, space: Space, window_ms: int, options: XPertOptions) -> dict[str, np.ndarray]:
    centroids = global_centroids(space.vectors, options.clusters, options.seed)
    until = int(log.ts.max()) + 1
    return {
        "vectors": space.vectors,
        "clusters": nearest_clusters(space.vectors, centroids),
        "centroids": centroids,
        "clicks": log.between(until - window_ms, until).popularity()[space.items].astype(np.float32),
    }


def _covisits(log: Interactions, counts: Counts, items: np.ndarray) -> dict[str, np.ndarray]:
    """The counts among the table's items, as of the log's end."""
    until = int(log.ts.max()) + 1
    visits = counts.count(log if counts.span is None else log.between(until - counts.span, until))
    inside = csr_array(visits.counts[items][:, items])
    inside.sort_indices()
    return {
        "covisits_indptr": inside.indptr.astype(np.int64),
        "covisits_indices": inside.indices.astype(np.int32),
        "covisits_values": inside.data.astype(np.float32),
        "covisits_clicks": visits.clicks[items].astype(np.float32),
    }
