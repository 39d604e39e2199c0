"""Language models beside a bundle, trained on the same sessions: does it help to have clusters, and these clusters?

They are bundles like any other, routed, decoded and calibrated as such, and are kept in a cache directory.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import msgspec
import torch

from models.bundle import Device
from models.forecaster import Forecaster
from trainer import fit
from trainer.contenders import KMEANS_LMS, LARGE_LM, SMALL_LM
from trainer.corpus import Corpus
from trainer.errors import TrainingError
from trainer.options import PAPER_CLUSTERS, TABLE_16, TrainOptions
from trainer.predictors import new_model

LARGE_DROPOUT = 0.1
LARGER = 4  # times the parameters of a bundle with one model: does a larger one help?
WIDEST = 1 << 14


def bundle_options(training: dict[str, Any]) -> TrainOptions:
    """The options that a bundle was trained with, from its config. Raises TrainingError when they are not there."""
    try:
        told = msgspec.convert(training, TrainOptions, dec_hook=lambda kind, value: kind(value))
        return dataclasses.replace(told, warm_start=None)
    except (msgspec.ValidationError, TypeError) as error:
        raise TrainingError(
            f"The bundle's config does not say how it was trained ({error}), so nothing can be fitted beside it in the "
            "same way. Train the bundle again, or evaluate it without the sessions of its training."
        ) from None


def went_on(forecaster: Forecaster) -> bool:
    """Whether the bundle went on from another: its models have seen more than the sessions of its own training."""
    return forecaster.config.training.get("warm_start") is not None


def control_options(options: TrainOptions, clusters: int, parameters: int, size: int) -> dict[str, TrainOptions]:
    """What to train beside a bundle of these options with `clusters`, `parameters` in all and `size` tokens.

    The single models see every user in one schedule as long as all phases of the bundle together: as many tokens as
    all its predictors have seen. The small one has the size of one predictor (matched compute); the large one at least
    the parameters of all of them (HeTLM, section 1.8), or LARGER times those of a single one. Beside pretrained models,
    which cannot be widened, it is the one that `large` names, tuned by adapters (Table 16), or none. K-means is left
    out beside a bundle that is nothing else; beside one of mode "paper" it clusters what that began with, into as many
    clusters. With one cluster whatever would be the bundle again is left out.
    """
    count, embedding = clusters, None
    if options.mode == "paper":
        # The paper's own baseline: its start, with as many clusters as it starts from, and without Algorithm 1.
        count, embedding = options.clusters or PAPER_CLUSTERS, options.paper.embedding
        shared = clusters if options.paper.critic == "soft" else 1  # a soft critic shows every predictor every session
        later, rate = options.paper.epochs * shared, options.paper.predictor_lr
    else:
        later, rate = options.fine_tune_epochs, options.fine_tune_lr
    kmeans = dataclasses.replace(
        options, mode="kmeans", backend="separate", soft=False, clusters=count, embedding=embedding,
        fine_tune_epochs=later, fine_tune_lr=rate,
    )  # fmt: skip
    # Its one phase lasts as many epochs as both phases.
    single = dataclasses.replace(kmeans, clusters=1, embedding=None)
    controls = {} if clusters == 1 else {SMALL_LM: single}
    if options.pretrained is None:
        width = matching_width(options, size, parameters * LARGER if clusters == 1 else parameters)
        controls[LARGE_LM] = dataclasses.replace(
            single,
            hidden_size=width,
            lr=options.lr * (options.hidden_size / width) ** 0.5,  # the wider, the smaller (hetlm_findings, section 7)
            dropout=max(options.dropout, LARGE_DROPOUT) if width >= 2 * options.hidden_size else options.dropout,
        )
    elif options.large is not None:
        options.check_large()  # now, not when all the others have been trained
        controls[LARGE_LM] = dataclasses.replace(
            single, backend="lora", pretrained=options.large, large=None, fine_tune_epochs=0, **TABLE_16
        )
    if options.mode != "kmeans" and count > 1:
        controls[KMEANS_LMS] = kmeans
    return controls


def matching_width(options: TrainOptions, size: int, parameters: int) -> int:
    """The least hidden size that gives a single model at least so many parameters, by bisection."""
    unit = options.heads * (1 if options.architecture == "opt" else 2)
    low, high = 0, WIDEST // unit  # low is too small
    while high - low > 1:
        middle = (low + high) // 2
        if _parameters(options, size, middle * unit) < parameters:
            low = middle
        else:
            high = middle
    return high * unit


def _parameters(options: TrainOptions, size: int, width: int) -> int:
    with torch.device("meta"):
        model = new_model(dataclasses.replace(options, hidden_size=width), size)
    return sum(parameter.numel() for parameter in model.parameters())


def control(options: TrainOptions, sessions: Path, corpus: Corpus, cache: Path, device: Device, progress: Any) -> Path:
    """The bundle of these options, in the cache or trained now."""
    told = dataclasses.replace(options, device=device, minutes=None, retrieve=False)
    identity = {**told.plain(), "device": None, "sessions": corpus.digest}
    digest = hashlib.sha256(msgspec.json.encode(identity, order="sorted")).hexdigest()[:8]
    epochs = told.epochs + told.fine_tune_epochs
    place = cache / f"{told.clusters}x{told.hidden_size}-{epochs}-epochs-{digest}"
    if not place.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fit.train(sessions, place, told, progress)
    return place
