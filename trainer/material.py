"""What a training run works on: its sessions, split and put into tokens, its options, and its place on disk."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from models.bundle import DeviceUnavailable, pick_device
from models.encoder import EncoderMissing, embed_pages
from models.routing import Router
from models.vocabulary import SPECIALS, Tokenizer, Vocabulary
from trainer import ranks
from trainer.checkpoints import Run
from trainer.corpus import Corpus, split
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.options import TrainOptions
from trainer.warmstart import Start
from trainer.windows import page_tokens

LONGEST = 0.99  # quantile of session lengths


@dataclass(frozen=True)
class Material:
    """Training and validation users of one corpus, and what every stage of the training needs."""

    corpus: Corpus
    train_users: np.ndarray
    held_users: np.ndarray
    vocabulary: Vocabulary
    options: TrainOptions
    store: Run
    device: torch.device
    progress: Any  # a rich Progress, or None
    deadline: float  # time.monotonic()
    start: Start | None = None  # what the training goes on from

    @classmethod
    def of(cls, corpus: Corpus, held: set[str] | None, options: TrainOptions, store: Run, progress: Any) -> "Material":
        """Split by user; `held` are validation users who were set apart. Raises TrainingError and BundleRefused."""
        train, validation = split(corpus, options.validation_share, options.seed, held)
        try:
            device = ranks.local(pick_device(options.device))
        except DeviceUnavailable as error:
            raise TrainingError(str(error)) from None
        budget = float("inf") if options.minutes is None else options.minutes * 60
        start = None if options.warm_start is None else Start.of(options.warm_start)
        known = [] if start is None else start.vocabulary.pages
        vocabulary = vocabulary_of(corpus, train, options.min_page_count, known)
        deadline = time.monotonic() + budget
        return cls(corpus, train, validation, vocabulary, options, store, device, progress, deadline, start)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token of each page of the corpus."""
        return page_tokens(self.corpus, self.vocabulary.tokens())

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the vocabulary."""
        return Tokenizer(self.vocabulary)

    @cached_property
    def embeddings(self) -> np.ndarray:
        """Embedding of each page's name, zeros for special tokens: (V, D) float32. Raises TrainingError."""
        kept = self.store.finished("embeddings")
        if kept is not None:
            return kept["embeddings"].numpy()
        try:
            pages = embed_pages(self.vocabulary.pages, self.options.encoder, self.device.type)
        except EncoderMissing as error:
            raise TrainingError(str(error)) from None
        embeddings = np.concatenate([np.zeros((len(SPECIALS), pages.shape[1]), dtype=np.float32), pages])
        self.store.finish("embeddings", {"embeddings": torch.tensor(embeddings)})
        return embeddings

    @property
    def max_pages(self) -> int:
        """Most pages of a generated session: hardly one is longer, and each page more costs every prediction a step."""
        longest = int(np.quantile(np.diff(self.corpus.starts), LONGEST, method="higher"))
        return min(self.options.max_pages, longest)

    @property
    def train_sessions(self) -> np.ndarray:
        """Indices of the training users' sessions."""
        chosen = np.isin(np.arange(len(self.corpus.users)), self.train_users)
        return np.flatnonzero(np.repeat(chosen, np.diff(self.corpus.first)))

    def held(self, router: Router | None, targets: int = 1) -> list[Example]:
        """The last sessions of the validation users, as examples."""
        return self.examples(self.held_users, router, targets)

    def examples(self, users: Iterable[int], router: Router | None, targets: int = 1) -> list[Example]:
        """The last sessions of these users that have one before them."""
        return examples(self.corpus, users, router, targets)


def vocabulary_of(corpus: Corpus, users: np.ndarray, min_count: int, known: Sequence[str] = ()) -> Vocabulary:
    """Pages of the training users, after those that were known before. Raises TrainingError where none is left."""
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
        known,
    )
    if not vocabulary.pages:
        raise TrainingError(f"No page is seen {min_count} times. Lower min_page_count, or give more sessions.")
    return vocabulary
