"""A bundle's config.json: everything that turns a visit into a forecast, besides weights and vocabulary."""

from pathlib import Path
from typing import Any

import msgspec

from models.manifest import BundleRefused, Verified
from models.vocabulary import Vocabulary

CONFIG = "config.json"
VOCABULARY = "vocabulary.json"
EMBEDDINGS = "embeddings.safetensors"
SELECTOR = "selector.safetensors"
OUTCOMES = "outcomes.safetensors"
CARD = "README.md"
KIND = "browsecast-bundle"
FORMAT = 1


class Decoding(msgspec.Struct, frozen=True):
    """How rollouts become an expected set (hetlm_findings, section 4)."""

    rollouts: int = 24
    max_pages: int = 32
    shrink: float = 16.0  # lambda: the visitor's own page frequencies weigh as much as so many rollouts
    own_weight: float = 2.0  # popularity weighs as much as so many sessions in the visitor's own frequencies
    fallback_pages: int = 6


class Outcome(msgspec.Struct, frozen=True):
    """How P(cart) or P(purchase) is read off pages, and its calibration.

    `pages`: a session has the outcome when it holds one of them. Without such pages the outcome has a logistic weight
    for every page in outcomes.safetensors. The probability is sigmoid(bias + rollout_weight * logit(p from rollouts)
    + own_weight * logit(the visitor's own rate)); `fallback_*` is the same without rollouts.
    """

    pages: list[str]
    base_rate: float
    threshold: float = 0.5
    bias: float = 0.0
    rollout_weight: float = 1.0
    own_weight: float = 0.0
    fallback_bias: float = 0.0
    fallback_own_weight: float = 1.0


class BundleConfig(msgspec.Struct, frozen=True):
    """config.json. `clusters` predictors of the kind `backend`; `selector` says what the routing sums mean."""

    kind: str
    format: int
    created: str  # UTC, ISO 8601
    selector: str  # "kmeans"
    backend: str  # "separate"
    architecture: str  # transformers' model_type
    clusters: int
    cluster_users: list[int]
    context_tokens: int
    decoding: Decoding
    cart: Outcome
    purchase: Outcome
    library_versions: dict[str, str] = {}
    training: dict[str, Any] = {}


def decode_config(verified: Verified) -> BundleConfig:
    """The verified config. Raises BundleRefused for another kind or format, before any other field is looked at."""
    content = verified.read(CONFIG)
    try:
        head = msgspec.json.decode(content, type=dict[str, Any])
        if head.get("kind") != KIND or head.get("format") != FORMAT:
            raise BundleRefused(
                verified.root,
                CONFIG,
                f"kind {head.get('kind')!r}, format {head.get('format')!r}; this version reads {KIND!r}, {FORMAT}",
                "Update Browsecast or train again.",
            )
        config = msgspec.convert(head, BundleConfig)
    except msgspec.MsgspecError as error:
        raise BundleRefused(verified.root, CONFIG, f"not a bundle's config ({error})") from None
    for field, value, known in (("selector", config.selector, "kmeans"), ("backend", config.backend, "separate")):
        if value != known:
            raise BundleRefused(
                verified.root,
                CONFIG,
                f"{field} {value!r} is not {known!r}, which this version reads",
                "Update Browsecast.",
            )
    return config


def decode_vocabulary(verified: Verified) -> Vocabulary:
    """The verified page vocabulary. Raises BundleRefused."""
    try:
        return msgspec.json.decode(verified.read(VOCABULARY), type=Vocabulary)
    except msgspec.DecodeError as error:
        raise BundleRefused(verified.root, VOCABULARY, f"not a vocabulary ({error})") from None


def write_json(path: Path, value: Any) -> None:
    """A struct or plain values as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
