"""Training, from session files to a bundle: vocabulary, clusters, one pretrained model, a copy of it a cluster."""

import copy
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.bundle import DeviceUnavailable, pick_device, save_bundle
from models.config import FORMAT, KIND, BundleConfig, Decoding
from models.encoder import EncoderMissing, embed_pages
from models.forecaster import Forecaster
from models.language_model import LanguageModel, build, from_pretrained
from models.outcomes import OutcomeHead
from models.predictors import Separate
from models.routing import Router
from models.vocabulary import SPECIALS, Tokenizer, Vocabulary
from trainer.calibration import SessionPages, base_rates, calibrate, find_outcome
from trainer.card import card, day
from trainer.checkpoints import Run
from trainer.clusters import assign, centroids, make_costs, router_of, user_embeddings
from trainer.corpus import Corpus, read_corpus, split
from trainer.descent import Judge, Phase, descend
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.judging import figures, predict
from trainer.options import TrainOptions
from trainer.windows import page_tokens, windows

__all__ = ["TrainOptions", "TrainingError", "train"]

FEWEST_USERS = 50  # a cluster with fewer keeps the pretrained model
FEWEST_JUDGES = 10  # a cluster with fewer validation users is judged on all of them
MOST_JUDGES = 1_000
FREE = ("minutes", "device", "checkpoint_steps")  # may change when a run goes on
LONGEST = 0.99  # quantile of session lengths
CALIBRATION_TARGETS = 3  # last sessions of each validation user that calibration looks at
LIBRARIES = ("torch", "transformers", "sentence-transformers", "scikit-learn", "numpy", "safetensors")


def train(sessions: Path, bundle: Path, options: TrainOptions | None = None, progress: Any = None) -> Path:
    """Learn from all Parquet session files below `sessions` and write the bundle; returns its path.

    Killed at any moment, the same call goes on from the last checkpoint in `<bundle>.training`. Each step is a JSON
    line in `<bundle>.steps.jsonl`. `progress` is a rich Progress or None. Raises TrainingError.
    """
    options, bundle = options or TrainOptions(), Path(bundle)
    corpus = read_corpus(Path(sessions))
    identity = {name: value for name, value in options.plain().items() if name not in FREE}
    beside = [bundle.with_name(bundle.name + ending) for ending in (".training", ".steps.jsonl")]
    store = Run(beside[0], {**identity, "sessions": corpus.digest}, beside[1])
    try:
        training = _Training(corpus, store, options, progress)
        training.fit()
        training.write(bundle)
    except DeviceUnavailable as error:
        raise TrainingError(str(error)) from None
    finally:
        store.close()
    store.remove()
    return bundle


class _Training:
    def __init__(self, corpus: Corpus, store: Run, options: TrainOptions, progress: Any) -> None:
        self.corpus, self.store, self.options, self.progress = corpus, store, options, progress
        self.deadline = time.monotonic() + options.minutes * 60 if options.minutes else float("inf")
        self.device = pick_device(options.device)
        self.train_users, self.held_users = split(corpus, options.validation_share, options.seed)
        self.vocabulary = _vocabulary(corpus, self.train_users, options.min_page_count)
        self.tokens = page_tokens(corpus, self.vocabulary.tokens())
        self.embeddings, self.centers = self._selector()
        self.costs = make_costs(self.embeddings, self.centers)
        self.router: Router = router_of(self.vocabulary, self.costs)
        self.clusters = self.router.width
        self.train_clusters = assign(corpus, self.train_users, self.router)
        self.judged = examples(corpus, self.held_users, self.router)
        self.models: list[PreTrainedModel] = []
        # Hardly a session is longer than this, and each page more costs every prediction a step.
        longest = int(np.quantile(np.diff(corpus.starts), LONGEST, method="higher"))
        self.max_pages = min(options.max_pages, longest)

    def fit(self) -> None:
        """Pretrain on all training users, then a copy for each cluster on its own."""
        options = self.options
        model = self._new_model()
        self._descend(model, "pretrain", self.train_users, self.judged)
        self.models = [model]
        if self.clusters == 1:
            return
        held = [self.router.cluster(example.visit.routing) for example in self.judged]
        self.models = [copy.deepcopy(model) for _ in range(self.clusters)]
        for k, copied in enumerate(self.models):
            users = self.train_users[self.train_clusters == k]
            if len(users) >= FEWEST_USERS and options.fine_tune_epochs:
                own = [example for example, cluster in zip(self.judged, held, strict=True) if cluster == k]
                self._descend(copied, f"cluster-{k}", users, own if len(own) >= FEWEST_JUDGES else self.judged)

    def write(self, bundle: Path) -> None:
        """Calibrate on the validation users, judge, and write the bundle."""
        corpus, options = self.corpus, self.options
        in_training = np.isin(np.arange(len(corpus.users)), self.train_users)
        train_sessions = np.flatnonzero(np.repeat(in_training, np.diff(corpus.first)))
        pages = SessionPages.of(corpus, train_sessions, self.tokens, len(self.vocabulary))
        outcomes = {name: find_outcome(pages, name, self.vocabulary) for name in ("cart", "purchase")}
        config = self._config({name: outcome for name, (outcome, _) in outcomes.items()})
        heads = [
            OutcomeHead(outcome, self.vocabulary.tokens(), len(self.vocabulary), weights)
            for outcome, weights in outcomes.values()
        ]
        models = [LanguageModel(model, self.device) for model in self.models]
        forecaster = Forecaster(config, self.vocabulary, self.router, Separate(models), heads)
        calibrate(forecaster, examples(corpus, self.held_users, self.router, CALIBRATION_TARGETS))
        alone, _ = figures(predict(forecaster, self.judged, base_rates(pages)), options.seed)
        parameters = sum(parameter.numel() for parameter in self.models[0].parameters())
        source = {
            "sessions": f"{len(corpus.session_ids):,} of {len(corpus.users):,} users, {len(corpus.pages):,} pages",
            "window": f"{day(corpus.window_ms[0])} to {day(corpus.window_ms[1])}",
            "training users": f"{len(self.train_users):,}",
        }
        text = card(forecaster.config, len(self.vocabulary.pages), parameters, alone, len(self.judged), source)
        save_bundle(
            bundle, forecaster.config, self.vocabulary, self.embeddings,
            {"costs": self.costs, "centroids": self.centers},
            {name: weights for name, (_, weights) in outcomes.items()},
            [model.float() for model in self.models], text,
        )  # fmt: skip

    def _selector(self) -> tuple[np.ndarray, np.ndarray]:
        kept = self.store.finished("selector")
        if kept is not None:
            return kept["embeddings"].numpy(), kept["centroids"].numpy()
        try:
            pages = embed_pages(self.vocabulary.pages, self.options.encoder, self.device.type)
        except EncoderMissing as error:
            raise TrainingError(str(error)) from None
        embeddings = np.concatenate([np.zeros((len(SPECIALS), pages.shape[1]), dtype=np.float32), pages])
        means = user_embeddings(self.corpus, self.train_users.tolist(), self.tokens, embeddings)
        centers = centroids(means, self.options.clusters, self.options.seed)
        self.store.finish("selector", {"embeddings": torch.tensor(embeddings), "centroids": torch.tensor(centers)})
        return embeddings, centers

    def _new_model(self) -> PreTrainedModel:
        options, size = self.options, len(self.vocabulary)
        torch.manual_seed(options.seed)
        positions = options.context_tokens + options.max_pages
        if options.pretrained is None:
            shape = (options.hidden_size, options.layers, options.heads)
            return build(options.architecture, size, *shape, positions, options.dropout)
        try:
            model = from_pretrained(options.pretrained, size)
        except (OSError, ValueError, KeyError) as error:
            raise TrainingError(f"{options.pretrained} holds no model that transformers can open: {error}") from None
        most = getattr(model.config, "max_position_embeddings", positions)
        if most < positions:
            raise TrainingError(
                f"{options.pretrained} has {most} positions, but context_tokens + max_pages is {positions}. Lower one."
            )
        return model

    def _judge(self, judged: Sequence[Example]) -> Judge:
        """Nats per token of the target sessions, given the sessions before."""
        tokenizer = Tokenizer(self.vocabulary)
        some = judged[:MOST_JUDGES]
        prompts = [tokenizer.render([tokenizer.encode(pages) for pages in e.visit.sessions]) for e in some]
        targets = [tokenizer.encode(example.target) for example in some]
        count = sum(len(target) + 1 for target in targets)

        def loss(model: LanguageModel) -> float:
            parts = [model.nll(prompts[i : i + 128], targets[i : i + 128]) for i in range(0, len(prompts), 128)]
            return float(sum(part.sum() for part in parts) / count)

        return loss

    def _descend(self, model: PreTrainedModel, name: str, users: np.ndarray, judged: Sequence[Example]) -> None:
        o, first = self.options, name == "pretrain"
        phase = Phase(
            name=name, rows=windows(self.corpus, users.tolist(), self.tokens, o.context_tokens),
            judge=self._judge(judged), epochs=o.epochs if first else o.fine_tune_epochs, batch=o.batch,
            lr=o.lr if first else o.fine_tune_lr, weight_decay=o.weight_decay, patience=o.patience, seed=o.seed,
            checkpoint_steps=o.checkpoint_steps, deadline=self.deadline, keep_start=not first,
        )  # fmt: skip
        descend(model, phase, self.store, self.device, self.progress)

    def _config(self, outcomes: dict[str, Any]) -> BundleConfig:
        options = self.options
        return BundleConfig(
            kind=KIND, format=FORMAT, created=datetime.now(UTC).isoformat(timespec="seconds"),
            selector="kmeans", backend="separate", architecture=self.models[0].config.model_type,
            clusters=self.clusters, cluster_users=np.bincount(self.train_clusters, minlength=self.clusters).tolist(),
            context_tokens=options.context_tokens,
            decoding=Decoding(rollouts=options.rollouts, max_pages=self.max_pages), **outcomes,
            library_versions={name: version(name) for name in LIBRARIES}, training=options.plain(),
        )  # fmt: skip


def _vocabulary(corpus: Corpus, users: np.ndarray, min_count: int) -> Vocabulary:
    """Pages of the training users."""
    chosen = np.isin(np.repeat(np.arange(len(corpus.users)), np.diff(corpus.first)), users)
    session_of_page = np.repeat(np.arange(len(chosen)), np.diff(corpus.starts))
    inside = chosen[session_of_page]
    counts = np.bincount(corpus.pages[inside], minlength=len(corpus.names))
    pairs = np.unique(session_of_page[inside].astype(np.int64) * len(corpus.names) + corpus.pages[inside])
    held = np.bincount(pairs % len(corpus.names), minlength=len(corpus.names))
    vocabulary = Vocabulary.fit(
        dict(zip(corpus.names, counts.tolist(), strict=True)),
        dict(zip(corpus.names, held.tolist(), strict=True)),
        int(chosen.sum()),
        min_count,
    )
    if not vocabulary.pages:
        raise TrainingError(f"No page is seen {min_count} times. Lower min_page_count, or give more sessions.")
    return vocabulary
