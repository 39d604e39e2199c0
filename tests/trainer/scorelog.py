"""A topic `scores` in memory, and what the judge needs besides: bundles that are only names."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from models.manifest import BundleRefused
from models.references import ModelRef
from streams import wire
from trainer.registry import Registry

OLD, CHAMPION, CHALLENGER, OTHER = (f"sha256:{letter * 64}" for letter in "0abc")


def score(
    champion: tuple[float, float, float],
    challenger: tuple[float, float, float] | None = None,
    user: str = "u1",
    cart: bool = False,
    **more: Any,
) -> wire.Score:
    """A score by (IoU, cart_p, purchase_p) of each; nobody buys."""
    iou, cart_p, purchase_p = champion
    shadow = None
    if challenger is not None:
        shadow = wire.ShadowScore(
            "shadow", 1, 0.0, 0.0, challenger[0], challenger[1], 0.0, challenger[2], 0.0, "", CHALLENGER
        )
    plain: dict[str, Any] = {
        "prediction_id": "p", "session_id": "s", "user_id": user, "hr": 1, "ioa": 0.0, "iop": 0.0, "iou": iou,
        "cart": cart, "cart_p": cart_p, "cart_log_loss": 0.0, "purchase": False, "purchase_p": purchase_p,
        "purchase_log_loss": 0.0, "model_version": "", "model_digest": CHAMPION, "shadow": shadow,
    }  # fmt: skip
    return wire.Score(**(plain | more))


def scores(
    count: int,
    better: float = 0.0,
    sharper: float = 0.0,
    baseline: float = -0.1,
    seed: int = 0,
    visitors: int = 400,
    **more: Any,
) -> list[wire.Score]:
    """Scores of sessions, a fifth of them with a cart.

    The challenger's IoU is higher by `better`, its P(cart) nearer to the truth by `sharper`; "the pages this visitor
    sees most" has an IoU higher than the champion's by `baseline`, "the last session again" one lower by 0.1.
    """
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        iou, cart = float(rng.beta(2, 3)), bool(rng.random() < 0.2)
        other = float(np.clip(iou + rng.normal(better, 0.2), 0, 1))
        own = float(np.clip(iou + rng.normal(baseline, 0.3), 0, 1))
        last = float(np.clip(iou + rng.normal(-0.1, 0.3), 0, 1))
        p = float(rng.beta(2, 8))
        q = float(np.clip(p + rng.normal(0, 0.05) + (sharper if cart else -sharper), 0, 1))
        r = float(np.clip(0.1 + rng.normal(0, 0.02), 0, 1))
        user, baselines = f"u{rng.integers(visitors)}", {"last_session": last, "own_frequencies": own}
        made.append(score((iou, p, 0.1), (other, q, r), user, cart, session_id=f"s{i}", baselines=baselines, **more))
    return made


def records(made: Iterable[wire.Score | None], partitions: int = 3, key: str = "u1") -> list[wire.Record]:
    """Records of all partitions, in turn; None is a null of the user `key`. Offsets have gaps as on Kafka."""
    log = []
    for i, one in enumerate(made):
        value = None if one is None else msgspec.json.encode(one)
        user = key if one is None else one.user_id
        log.append(wire.Record(i % partitions, 2 * (i // partitions), user.encode(), value, 0))
    return log


class Played:
    """`Feed` over a list of records, so many at a time."""

    topic = "scores"

    def __init__(self, log: Sequence[wire.Record], at_a_time: int = 100) -> None:
        self.log, self._at_a_time = list(log), at_a_time
        self._unread: list[wire.Record] = []
        self._reached: dict[int, int] = {}

    def assign(self, positions: Mapping[int, int]) -> None:
        self._reached = {record.partition: 0 for record in self.log} | dict(positions)
        self._unread = [record for record in self.log if record.offset >= self._reached[record.partition]]

    def poll(self, max_records: int, timeout_s: float) -> list[wire.Record]:
        some, self._unread = self._unread[: self._at_a_time], self._unread[self._at_a_time :]
        self._reached |= {record.partition: record.offset + 1 for record in some}
        return some

    def reached(self) -> dict[int, int]:
        return dict(self._reached)

    def ends(self) -> dict[int, int]:
        ends: dict[int, int] = {}
        for record in self.log:
            ends[record.partition] = record.offset + 1
        return ends

    def commit(self, positions: Mapping[int, int]) -> None:
        assert all(self._reached[partition] == offset for partition, offset in positions.items())

    def close(self) -> None:
        pass


class Names(Registry):
    """A registry of bundles without content; `damaged` ones are refused."""

    def __init__(self, digests: Iterable[str]) -> None:
        self.address = "memory"
        self.digests, self.damaged = list(digests), set[str]()

    def bundles(self) -> list[ModelRef]:
        return [ModelRef(digest[7:11], digest, f"memory://{digest[7:11]}", 1) for digest in self.digests]

    def verify(self, ref: ModelRef) -> None:
        if ref.digest in self.damaged:
            raise BundleRefused(ref.uri, "config.json", "its bytes do not match the manifest's digest")
