"""The page vocabulary: one token a page, and four special tokens before them."""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from models.specials import BOS, EOS, PAD, SPECIALS, UNK

__all__ = ["BOS", "EOS", "PAD", "SPECIALS", "UNK", "Tokenizer", "Vocabulary", "presence"]


class Vocabulary(msgspec.Struct, frozen=True):
    """Pages by token: `pages[i]` has token i + 4. `shares[i]` is the share of training sessions that hold page i.

    `sessions` is the number of those sessions.
    """

    pages: list[str]
    shares: list[float]
    sessions: int

    def __post_init__(self) -> None:
        if len(self.pages) != len(self.shares) or len(set(self.pages)) != len(self.pages):
            raise ValueError("pages must be distinct, with one share each")

    @classmethod
    def fit(
        cls,
        counts: Mapping[str, int],
        held: Mapping[str, int],
        sessions: int,
        min_count: int,
        before: Sequence[str] = (),
    ) -> "Vocabulary":
        """Pages seen at least `min_count` times, the most frequent first; `held` counts the sessions with the page.

        The pages of `before` keep the tokens they had, seen or not; new pages come after them.
        """
        known = set(before)
        new = (page for page, count in counts.items() if count >= min_count and page not in known)
        kept = [*before, *sorted(new, key=lambda p: (-counts[p], p))]
        return cls(kept, [held.get(page, 0) / max(sessions, 1) for page in kept], sessions)

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.pages)

    def tokens(self) -> dict[str, int]:
        """Page name to token."""
        return {page: token for token, page in enumerate(self.pages, len(SPECIALS))}


class Tokenizer:
    """Sessions to tokens and back. An unknown page becomes [UNK]; no special token becomes a page."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.names = [*SPECIALS, *vocabulary.pages]
        self._tokens = vocabulary.tokens()

    def encode(self, pages: Sequence[str]) -> list[int]:
        """Tokens of the pages, without [BOS] and [EOS]."""
        get = self._tokens.get
        return [get(page, UNK) for page in pages]

    def render(self, sessions: Sequence[Sequence[int]]) -> list[int]:
        """Token sessions as one prompt: [BOS] pages [EOS] for each, then the [BOS] of the session to come."""
        prompt: list[int] = []
        for session in sessions:
            prompt += [BOS, *session, EOS]
        return [*prompt, BOS]

    def decode(self, tokens: Sequence[int]) -> list[str]:
        """Page names of the tokens, special tokens left out."""
        return [self.names[token] for token in tokens if token >= len(SPECIALS)]


def presence(sessions: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """How many of the token sessions hold each token: `size` counts, special tokens always 0."""
    counts = np.zeros(size)
    for session in sessions:
        counts[list(set(session))] += 1.0
    counts[: len(SPECIALS)] = 0.0
    return counts
