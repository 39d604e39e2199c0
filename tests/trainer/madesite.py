"""Sites that are made up: visitors of five kinds, each with tastes of its own, before and after a change.

A kind has its own page frequencies, and a visitor's are drawn around those of the kind, so one visitor's sessions are
alike. Carts and purchases are a visitor's habit, too, which a forecast of the mean alone does not know.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from tests.trainer.scorelog import score
from trainer.drift import WINDOW_SCORES, Reference, Window

KINDS = np.array([0.30, 0.25, 0.20, 0.15, 0.10])
PAGES = 300
TASTE = 30.0  # the smaller, the more a visitor's pages differ from the kind's
CART, PURCHASE = 0.2, 0.1
HABIT = 10.0  # visitors' own rates are Beta distributed, with this as the sum of its parameters


@dataclass
class Site:
    """One site. `rng` makes the visitors; the kinds and the pages are the site's own."""

    seed: int
    kinds: np.ndarray = field(default_factory=lambda: KINDS)
    rng: np.random.Generator = field(init=False)
    frequencies: np.ndarray = field(init=False)  # (kinds, pages)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        popular = 1 / np.arange(1, PAGES + 1)
        draws = self.rng.dirichlet(20 * popular / popular.sum(), size=len(self.kinds))
        self.frequencies = (draws + popular / popular.sum()) / 2

    def sessions(self, visitors: int, each: float = 3.0) -> pa.Table:
        """About `each` sessions of four pages of every visitor: user_id, pages."""
        users: list[str] = []
        lists: list[list[str]] = []
        for user in range(visitors):
            kind = self.rng.choice(len(self.kinds), p=self.kinds)
            own = self.rng.dirichlet(TASTE * self.frequencies[kind] + 1e-9)
            sizes = 1 + self.rng.poisson(3, size=self.rng.geometric(1 / each))
            pages = [f"p{page}" for page in self.rng.choice(PAGES, size=sizes.sum(), p=own)]
            ends = np.cumsum(sizes)
            users += [f"u{user}"] * len(sizes)
            lists += [pages[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        return _with_pages(pa.table({"user_id": users}), lists)

    def window(self, visitors: int = 400, carts: float = 1.0, purchases: float = 1.0) -> Window:
        """As many scores as fill one, by a forecast of the mean rates; what really happens is so many times that."""
        window = Window()
        kinds = self.rng.choice(len(self.kinds), size=visitors, p=self.kinds)
        cart, purchase = (
            np.minimum(times * self.rng.beta(HABIT * rate, HABIT * (1 - rate), visitors), 1.0)
            for rate, times in ((CART, carts), (PURCHASE, purchases))
        )
        for user in self.rng.integers(0, visitors, WINDOW_SCORES):
            made = score(
                (0.5, CART, PURCHASE), None, f"u{user}", bool(self.rng.random() < cart[user]),
                purchase=bool(self.rng.random() < purchase[user]), cluster=int(kinds[user]),
            )  # fmt: skip
            window.add(made)
        return window

    def with_kinds(self, kinds: np.ndarray) -> "Site":
        """The same pages, other visitors."""
        other = Site(self.seed, kinds / kinds.sum())
        other.rng, other.frequencies = self.rng, self.frequencies
        return other


def reference(sessions: pa.Table, site: Site, users: int = 2_000) -> Reference:
    """What a champion that was trained on these sessions tells; a page seen once is not in its vocabulary."""
    lists = sessions["pages"].to_pylist()
    clicks = np.unique([page for pages in lists for page in pages], return_counts=True)
    held = dict(zip(*np.unique([page for pages in lists for page in set(pages)], return_counts=True), strict=True))
    pages = [str(page) for page, count in zip(*clicks, strict=True) if count >= 2]
    shares = np.array([held[page] for page in pages]) / len(lists)
    return Reference(pages, shares, len(lists), site.rng.multinomial(users, site.kinds).astype(float))


def renamed(sessions: pa.Table, share: float, rng: np.random.Generator) -> pa.Table:
    """That share of the clicks goes to pages that nobody has seen before."""
    lists = sessions["pages"].to_pylist()
    return _with_pages(
        sessions, [[f"new {page}" if rng.random() < share else page for page in pages] for pages in lists]
    )


def led_in(sessions: pa.Table, share: float, rng: np.random.Generator) -> pa.Table:
    """That share of the sessions begins on a page that was there before, and hardly seen: a campaign."""
    page = f"p{PAGES // 2}"
    return _with_pages(
        sessions, [[page, *pages] if rng.random() < share else pages for pages in sessions["pages"].to_pylist()]
    )


def _with_pages(sessions: pa.Table, lists: list[list[str]]) -> pa.Table:
    return pa.table({"user_id": sessions["user_id"], "pages": pa.array(lists, pa.list_(pa.string()))})
