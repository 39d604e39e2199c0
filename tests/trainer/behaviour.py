"""Visitors of known types: each type is a Markov chain over the same pages, so only behaviour tells them apart."""

from collections.abc import Sequence

import numpy as np

from models.vocabulary import SPECIALS, Vocabulary
from trainer.corpus import Corpus
from trainer.windows import page_tokens

PAGES = [f"p{i}" for i in range(10)]
STOP = 0.2


def corpus_of(users: Sequence[Sequence[Sequence[str]]]) -> Corpus:
    """A corpus of these users' sessions, oldest first; a session with the page `p0` has a cart."""
    sessions = [session for user in users for session in user]
    names = sorted({page for session in sessions for page in session})
    place = {name: i for i, name in enumerate(names)}
    cart = np.array(["p0" in session for session in sessions])
    return Corpus(
        users=[f"u{i:05d}" for i in range(len(users))],
        first=np.cumsum([0, *(len(user) for user in users)]),
        session_ids=[f"s{i}" for i in range(len(sessions))],
        starts=np.cumsum([0, *(len(session) for session in sessions)]),
        pages=np.array([place[page] for session in sessions for page in session], dtype=np.int32),
        names=names,
        cart=cart,
        purchase=np.zeros_like(cart),
        window_ms=(0, 1),
        digest="",
    )


def visitors(count: int, types: int, seed: int = 0) -> tuple[Corpus, np.ndarray]:
    """`count` users with two to five sessions, and the type of each."""
    steps = np.random.default_rng(99).dirichlet(np.full(len(PAGES), 0.3), size=(types, len(PAGES) + 1))
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, types, size=count)
    users = [[_session(steps[kind], rng) for _ in range(rng.integers(2, 6))] for kind in kinds]
    return corpus_of(users), kinds


def vocabulary_of(corpus: Corpus) -> tuple[Vocabulary, np.ndarray]:
    """All pages of the corpus, and the token of each."""
    vocabulary = Vocabulary(corpus.names, [0.1] * len(corpus.names), 1)
    return vocabulary, page_tokens(corpus, vocabulary.tokens())


def embeddings_of(vocabulary: Vocabulary, width: int = 6) -> np.ndarray:
    """Random page embeddings (V, width); zeros for special tokens."""
    embeddings = np.random.default_rng(5).normal(size=(len(vocabulary), width)).astype(np.float32)
    embeddings[: len(SPECIALS)] = 0.0
    return embeddings


def _session(steps: np.ndarray, rng: np.random.Generator) -> list[str]:
    pages = [int(rng.choice(len(PAGES), p=steps[-1]))]
    while rng.random() > STOP and len(pages) < 30:
        pages.append(int(rng.choice(len(PAGES), p=steps[pages[-1]])))
    return [PAGES[page] for page in pages]
