"""Training, from session files to a bundle: clusters of visitors, their predictors, and what validation chooses."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from models.bundle import save_bundle
from models.config import FORMAT, KIND, BundleConfig, Decoding, EncoderUsed, Outcome
from models.encoder import EncoderMissing, encoder_digest, encoder_path
from models.forecaster import Forecaster
from models.outcomes import OUTCOMES, OutcomeHead
from models.predictors import one_hot
from models.routing import ChainRouter
from models.selector import MLPSelector, make_embed, selector_tensors
from trainer import ranks
from trainer.calibration import CALIBRATION_TARGETS, SessionPages, calibrate, choose_softness, find_outcome
from trainer.card import card, day
from trainer.catalogue import FittedItems, embed_texts, fit_items, read_texts
from trainer.checkpoints import Run
from trainer.clusters import make_costs, router_of
from trainer.contenders import Bundle, unfitted
from trainer.corpus import read_training, training_parts
from trainer.curves import draw
from trainer.errors import TooFewClicks, TrainingError
from trainer.grouping import Grouping, by_behaviour, by_names, by_sessions
from trainer.judging import judge, outcome_pages
from trainer.material import Material
from trainer.options import PAPER_CLUSTERS, TrainOptions, paper_rates
from trainer.paper import fit_paper
from trainer.predictors import Trained, pretrain, train_predictors
from trainer.sessionitems import read_item_log

__all__ = ["TrainOptions", "TrainingError", "train"]

# May change when a run goes on: items are fitted after the language models, and nothing of them is kept in the run.
FREE = ("minutes", "device", "checkpoint_steps", "retrieve", "items", "retrieval")
ITEMS_TOLD = "items"  # among what was chosen: which items were fitted, or why none were
LIBRARIES = ("torch", "transformers", "sentence-transformers", "scikit-learn", "numpy", "safetensors")


def train(sessions: Path, bundle: Path, options: TrainOptions | None = None, progress: Any = None) -> Path:
    """Learn from the session files below `sessions` and write the bundle; returns its path.

    Killed at any moment, the same call goes on from the last checkpoint in `<bundle>.training`. Each step is a JSON
    line in `<bundle>.steps.jsonl`, drawn in `<bundle>.steps.svg`. Under `torchrun` every process makes the same call
    and the first one writes. `progress` is a rich Progress or None. Raises TrainingError, and BundleRefused where the
    bundle to start from is damaged.
    """
    options, bundle = options or TrainOptions(), Path(bundle)
    texts = _texts(options)
    corpus, held = read_training(Path(sessions))
    identity = {name: value for name, value in options.plain().items() if name not in FREE}
    training, log, picture = (
        bundle.with_name(bundle.name + ending) for ending in (".training", ".steps.jsonl", ".steps.svg")
    )
    with ranks.joined():
        store = Run(training, {**identity, "sessions": corpus.digest}, log)
        try:
            material = Material.of(corpus, held, options, store, progress)
            grouping, trained = _fit(material)
            if ranks.rank() == 0:
                _write(material, grouping, trained, bundle, *_items(material, Path(sessions), texts))
                draw(log, picture)
            ranks.wait()
        finally:
            store.close()
        store.remove()
    return bundle


def _fit(material: Material) -> tuple[Grouping, Trained]:
    mode = material.options.mode
    if mode == "paper":
        return _paper(material)
    if mode == "behaviour":
        grouping = by_behaviour(material)
    else:
        embedding = material.options.embedding
        grouping = by_names(material) if embedding is None else by_sessions(material, embedding)
    return grouping, train_predictors(material, grouping)


def _paper(material: Material) -> tuple[Grouping, Trained]:
    """HeTLM as published: clusters and predictors learn together, from K-means clusters and one pretrained model."""
    m, o = material, material.options
    embed = make_embed(o.paper.embedding, m.embeddings, m.tokenizer, o.encoder, m.device.type)
    fitted = fit_paper(
        pretrain(m), m.examples(m.train_users, None), m.held(None), embed, m.tokenizer, o.clusters or PAPER_CLUSTERS,
        o.paper, m.store, m.device, o.context_tokens, o.seed, m.progress, m.deadline, o.checkpoint_steps,
    )  # fmt: skip
    costs = make_costs(m.embeddings, fitted.centroids)
    tensors = {**selector_tensors(fitted.selector), "costs": costs, "centroids": fitted.centroids}
    grouping = Grouping(
        "mlp", router_of(m.vocabulary, costs), MLPSelector(fitted.selector, embed), tensors,
        one_hot(fitted.clusters.tolist(), len(fitted.models)), {"users_by_epoch": fitted.history},
    )  # fmt: skip
    return grouping, Trained("separate", len(fitted.models), fitted.models)


def _texts(options: TrainOptions) -> dict[str, str] | None:
    """Of the items, by id; None without a catalogue. Raises TrainingError, before hours of training rather than after.

    There must also be an encoder to read them.
    """
    if options.items is None or not options.retrieve:
        return None
    try:
        encoder_path(options.encoder)
    except EncoderMissing as error:
        raise TrainingError(str(error)) from None
    return read_texts(options.items)


def _items(m: Material, sessions: Path, texts: dict[str, str] | None) -> tuple[FittedItems | None, str]:
    """The items of the sessions and how to retrieve them, and what is to be told of them. Raises TrainingError."""
    if not m.options.retrieve:
        return None, "none: the options say so (retrieve = false)"
    task = None if m.progress is None else m.progress.add_task("items", total=None)
    found = None
    try:
        found = _fit_items(
            m, sessions, texts,
            lambda what: None if task is None else m.progress.update(task, description=f"items: {what}"),
        )  # fmt: skip
        told = found.told
    except TooFewClicks as error:
        told = f"none: {error}"
    if task is not None:
        m.progress.remove_task(task)
        m.progress.console.print(f"items: {told}", markup=False, highlight=False, soft_wrap=True)
    return found, told


def _fit_items(m: Material, sessions: Path, texts: dict[str, str] | None, note: Callable[[str], None]) -> FittedItems:
    """Raises TooFewClicks where there is nothing to fit."""
    log = read_item_log([place for place in training_parts(sessions) if place is not None])
    if log is None:
        raise TooFewClicks("No event of these sessions names an item (item_id).")
    o = m.options
    embedded = None if texts is None else embed_texts(log.items, texts, o.encoder, m.device.type)
    return fit_items(log, replace(o.retrieval, seed=o.seed), embedded, note)


def _write(
    material: Material, grouping: Grouping, trained: Trained, bundle: Path, items: FittedItems | None, told: str
) -> None:
    """Calibrate on the validation users, judge, and write the bundle."""
    m, o, corpus = material, material.options, material.corpus
    pages = SessionPages.of(corpus, m.train_sessions, m.tokens, len(m.vocabulary))
    outcomes = {name: find_outcome(pages, name, m.vocabulary) for name in OUTCOMES}
    config = _config(m, grouping, trained, {name: outcome for name, (outcome, _) in outcomes.items()}, told)
    chains = grouping.router.chains if isinstance(grouping.router, ChainRouter) else None
    heads = [
        OutcomeHead(outcome, m.vocabulary.tokens(), len(m.vocabulary), weights, chains)
        for outcome, weights in outcomes.values()
    ]
    forecaster = Forecaster(
        config, m.vocabulary, grouping.router, grouping.selector, trained.predictor(m.device), heads
    )
    judged = m.held(grouping.router)
    if o.soft is None and o.mode == "behaviour":
        choose_softness(forecaster, judged)
    calibrate(forecaster, m.held(grouping.router, CALIBRATION_TARGETS))
    contenders = [Bundle(forecaster), *unfitted(forecaster)]
    judgement = judge(contenders, judged, outcome_pages(forecaster), o.seed)
    source = {
        "sessions": f"{len(corpus.session_ids):,} of {len(corpus.users):,} users, {len(corpus.pages):,} pages",
        "window": f"{day(corpus.window_ms[0])} to {day(corpus.window_ms[1])}",
        "training users": f"{len(m.train_users):,}",
        "items": told,
        "start": "from scratch" if m.start is None else f"went on from the bundle {m.start.digest}",
    }
    if o.mode == "paper":
        source["learning rates"] = paper_rates(o)
    text = card(forecaster.config, len(m.vocabulary.pages), trained.parameters, judgement, source)
    save_bundle(
        bundle, forecaster.config, m.vocabulary, m.embeddings, grouping.tensors,
        {name: weights for name, (_, weights) in outcomes.items()},
        [model.float() for model in trained.models], text,
        None if trained.adapters is None else trained.adapters.tensors(), None if items is None else items.pair,
    )  # fmt: skip


def _config(
    m: Material, grouping: Grouping, trained: Trained, outcomes: dict[str, Outcome], items: str
) -> BundleConfig:
    o = m.options
    return BundleConfig(
        kind=KIND, format=FORMAT, created=datetime.now(UTC).isoformat(timespec="seconds"),
        mode=o.mode, selector=grouping.kind, backend=trained.backend, soft=bool(o.soft),
        embedding=o.selector_embedding or "pages", encoder=_encoder_used(o),
        architecture=trained.models[0].config.model_type, clusters=trained.clusters, cluster_users=grouping.users,
        context_tokens=o.context_tokens, decoding=Decoding(rollouts=o.rollouts, max_pages=m.max_pages),
        cart=outcomes["cart"], purchase=outcomes["purchase"],
        library_versions={name: version(name) for name in LIBRARIES},
        training={
            **o.plain(), "sessions": m.corpus.digest,
            "chosen": msgspec.to_builtins({**grouping.choices, ITEMS_TOLD: items}),
        },
    )  # fmt: skip


def _encoder_used(options: TrainOptions) -> EncoderUsed | None:
    if options.selector_embedding != "text":
        return None
    directory = None if options.encoder is None else str(options.encoder.resolve())
    return EncoderUsed(encoder_digest(options.encoder), directory)
