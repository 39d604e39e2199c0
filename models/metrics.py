"""How right a prediction was. Set semantics: each page counts once, whatever the order (HeTLM, section on metrics)."""

from collections.abc import Collection
from math import log

CLIP = 1e-7


def hr(actual: Collection[str], predicted: Collection[str]) -> int:
    """Hit rate: 1 when at least one predicted page came, else 0."""
    return int(not set(actual).isdisjoint(predicted))


def ioa(actual: Collection[str], predicted: Collection[str]) -> float:
    """Share of the pages that came which were predicted; 0 when no page came."""
    came = set(actual)
    return len(came & set(predicted)) / len(came) if came else 0.0


def iop(actual: Collection[str], predicted: Collection[str]) -> float:
    """Share of the predicted pages that came; 0 when no page was predicted."""
    expected = set(predicted)
    return len(expected & set(actual)) / len(expected) if expected else 0.0


def iou(actual: Collection[str], predicted: Collection[str]) -> float:
    """Pages both predicted and seen, over pages either predicted or seen; 0 when both are empty."""
    union = set(actual) | set(predicted)
    return len(set(actual) & set(predicted)) / len(union) if union else 0.0


def log_loss(p: float, happened: bool) -> float:
    """Negative log probability of what happened, in nats, with `p` clipped to [1e-7, 1 - 1e-7]."""
    p = min(max(p, CLIP), 1.0 - CLIP)
    return -log(p if happened else 1.0 - p)
