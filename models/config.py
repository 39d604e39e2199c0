"""A bundle's config.json: everything that turns a visit into a forecast, besides weights and vocabulary."""

from pathlib import Path
from typing import Any, Literal

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
FORMAT = 2

Mode = Literal["behaviour", "paper", "kmeans"]
Selector = Literal["mixture", "mlp", "kmeans"]
Backend = Literal["separate", "lora", "token"]
Embedding = Literal["pages", "text"]
Source = Literal["own", "passage", "rollouts", "combined"]  # of an outcome's probability; the last three with own rate


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
    + passage_weight * logit(p of first passage in the chains) + own_weight * logit(the visitor's own rate)).
    `source` says which of them validation chose, the others have weight 0; `fallback_*` is the own rate alone.
    """

    pages: list[str]
    base_rate: float
    threshold: float = 0.5
    source: Source = "rollouts"
    bias: float = 0.0
    rollout_weight: float = 1.0
    passage_weight: float = 0.0
    own_weight: float = 0.0
    fallback_bias: float = 0.0
    fallback_own_weight: float = 1.0


class EncoderUsed(msgspec.Struct, frozen=True):
    """The sentence encoder that a selector of texts was trained with: another one would say something else."""

    sha256: str  # of its weights
    directory: str | None = None  # None: the installed package


class BundleConfig(msgspec.Struct, frozen=True):
    """config.json of a bundle whose `clusters` were found by `mode`.

    `selector` says how a visitor is routed: by the running posterior of a mixture of Markov chains, by an MLP, or to
    the nearest K-means centroid. `embedding` is what the MLP sees: the mean page embedding, or the sessions as text.
    `backend` says who predicts: a model for each cluster, one model with an adapter for each, or one model that is told
    the cluster by a token. With `soft` a visitor is spread over the clusters by the posterior.
    """

    kind: str
    format: int
    created: str  # UTC, ISO 8601
    mode: Mode
    selector: Selector
    backend: Backend
    architecture: str  # transformers' model_type
    clusters: int
    cluster_users: list[int]
    context_tokens: int
    decoding: Decoding
    cart: Outcome
    purchase: Outcome
    soft: bool = False
    embedding: Embedding = "pages"
    encoder: EncoderUsed | None = None  # where `embedding` is "text"
    vocabulary_sha256: str | None = None  # the vocabulary.json that the weights belong to; `save_bundle` fills it in
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
    listed = verified.manifest.files.get(VOCABULARY)
    if config.vocabulary_sha256 is not None and (listed is None or listed.sha256 != config.vocabulary_sha256):
        raise BundleRefused(verified.root, VOCABULARY, f"not the vocabulary that {CONFIG} was written with")
    return config


def decode_vocabulary(verified: Verified) -> Vocabulary:
    """The verified page vocabulary. Raises BundleRefused."""
    try:
        return msgspec.json.decode(verified.read(VOCABULARY), type=Vocabulary)
    except msgspec.DecodeError as error:
        raise BundleRefused(verified.root, VOCABULARY, f"not a vocabulary ({error})") from None


def version_of(config: BundleConfig, digest: str) -> str:
    """A readable name that changes with the digest: when it was made, and how the digest begins."""
    return f"{config.created[:19].replace(':', '')}-{digest.removeprefix('sha256:')[:8]}"


def write_json(path: Path, value: Any) -> None:
    """A struct or plain values as indented JSON."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
