"""Training of the predictors: K models, one with K adapters, or one that is told the cluster by a token."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from models.adapters import Adapters, linear_names
from models.config import Backend
from models.language_model import LanguageModel, build
from models.predictors import Predictor, Separate, Token, one_hot
from models.pretrained import Unsuitable, from_pretrained
from models.visit import recent
from trainer.descent import Judge, Phase, descend
from trainer.errors import TrainingError
from trainer.examples import Example
from trainer.grouping import Grouping
from trainer.material import Material
from trainer.options import TrainOptions
from trainer.windows import windows_of

FEWEST_USERS = 50  # a cluster with fewer keeps the pretrained model
FEWEST_JUDGES = 10  # a cluster with fewer validation users is judged on all of them
MOST_JUDGES = 1_000
CHUNK = 128


@dataclass(frozen=True)
class Trained:
    """Models that have learnt, ready for a bundle."""

    backend: Backend
    clusters: int
    models: list[PreTrainedModel]  # one a cluster, or one for all
    adapters: Adapters | None = None

    def predictor(self, device: torch.device, dtype: torch.dtype | None = None) -> Predictor:
        """Copies of the models at work, as a bundle would load them: on a GPU in bf16, while these keep float32."""
        models = copy.deepcopy(self.models) if self.adapters is None else self.adapters
        return _predictor(self.backend, self.clusters, models, device, dtype)

    @property
    def parameters(self) -> int:
        """Numbers in all models together."""
        modules = self.models if self.adapters is None else [self.adapters]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())


def train_predictors(material: Material, grouping: Grouping) -> Trained:
    """Predictors for the clusters, by the backend of the options; one cluster needs but one model."""
    backend, clusters = material.options.predictors, grouping.selector.clusters
    if clusters == 1 and backend == "lora" and material.options.tunes_pretrained:
        return Trained("separate", 1, [_tuned(material)])
    if clusters == 1:
        return Trained("separate", 1, [pretrain(material, more=material.options.fine_tune_epochs)])
    if backend == "token":
        return _token(material, grouping)
    return _lora(material, grouping) if backend == "lora" else _separate(material, grouping)


def pretrain(material: Material, more: int = 0) -> PreTrainedModel:
    """One model on all training users, for `more` epochs than the options say."""
    o = material.options
    model = _first(material)
    judge = _judge(material, "separate", one_hot([0] * len(material.held_users), 1), material.held(None))
    rows, _ = _windows(material, range(len(material.train_users)))
    phase = _phase(o, "pretrain", rows, judge, material, o.epochs + more, fine_tune=material.start is not None)
    descend(model, phase, *_tools(material))
    return model


def new_model(options: TrainOptions, size: int) -> PreTrainedModel:
    """A model over `size` tokens, new or from a local directory. Raises TrainingError."""
    torch.manual_seed(options.seed)
    positions = options.context_tokens + options.max_pages + 1  # a cluster token goes before the context
    if options.pretrained is None:
        shape = (options.hidden_size, options.layers, options.heads)
        return build(options.architecture, size, *shape, positions, options.dropout)
    try:
        model = from_pretrained(options.pretrained, size)
    except Unsuitable as error:
        raise TrainingError(f"{options.pretrained}: {error}") from None
    except (OSError, ValueError) as error:
        raise TrainingError(f"{options.pretrained} holds no model that transformers can open: {error}") from None
    most = getattr(model.config, "max_position_embeddings", positions)
    if most < positions:
        raise TrainingError(
            f"{options.pretrained} has {most} positions, but context_tokens + max_pages + 1 is {positions}. Lower one."
        )
    if options.predictors == "lora":
        try:
            linear_names(model)
        except ValueError as error:
            raise TrainingError(f"{options.pretrained}: {error}. Take another model, or another backend.") from None
    return model


def _first(material: Material, clusters: int = 0) -> PreTrainedModel:
    """What the first phase begins with, with so many cluster tokens: a new model, or that of the warm start."""
    if material.start is None:
        return new_model(material.options, len(material.vocabulary) + clusters)
    return material.start.model(0, material.vocabulary, material.options.seed)


def _separate(material: Material, grouping: Grouping) -> Trained:
    o, clusters = material.options, grouping.selector.clusters
    epochs = o.fine_tune_epochs
    if material.start is None:
        first = pretrain(material)
        models = [copy.deepcopy(first) for _ in range(clusters)]
    else:
        models = [material.start.model(k, material.vocabulary, o.seed) for k in range(clusters)]
        epochs += o.epochs  # there is no phase for all before
    chosen = grouping.posterior.argmax(axis=1)
    held, routed = _routed_examples(material, grouping)
    for k, model in enumerate(models):
        members = np.flatnonzero(chosen == k)
        if len(members) < FEWEST_USERS or not epochs:
            continue
        own = [example for example, row in zip(held, routed, strict=True) if row.argmax() == k]
        own = own if len(own) >= FEWEST_JUDGES else held
        judge = _judge(material, "separate", one_hot([0] * len(own), 1), own)
        rows, _ = _windows(material, members.tolist())
        descend(model, _phase(o, f"cluster-{k}", rows, judge, material, epochs, fine_tune=True), *_tools(material))
    return Trained("separate", clusters, models)


def _lora(material: Material, grouping: Grouping) -> Trained:
    o, clusters = material.options, grouping.selector.clusters
    adapters, epochs = _adapters(material, clusters)
    if o.freeze_trunk:
        adapters.freeze()
    held, routed = _routed_examples(material, grouping)
    rows, owners = _windows(material, range(len(material.train_users)))
    judge = _judge(material, "lora", routed, held)
    phase = _phase(o, "adapters", rows, judge, material, epochs, fine_tune=True, posterior=grouping.posterior[owners])
    descend(adapters, phase, *_tools(material))
    return Trained("lora", clusters, [adapters.plain()], adapters)


def _adapters(material: Material, clusters: int) -> tuple[Adapters, int]:
    """A trunk with adapters, and for how many epochs both learn: new, or those of the warm start."""
    o, start = material.options, material.start
    if start is not None and start.adapters is not None:
        return Adapters.from_tensors(_first(material), start.adapters), o.epochs + o.fine_tune_epochs
    return _new_adapters(material, pretrain(material), clusters), o.fine_tune_epochs


def _new_adapters(material: Material, trunk: PreTrainedModel, clusters: int) -> Adapters:
    o = material.options
    torch.manual_seed(o.seed)
    return Adapters(trunk, clusters, o.adapter_rank, o.adapter_alpha, o.adapter_dropout)


def _tuned(material: Material) -> PreTrainedModel:
    """A pretrained model on all training users: adapters and the new page embeddings learn, the trunk stays."""
    adapters, epochs = _new_adapters(material, _first(material), 1), material.options.epochs
    adapters.freeze(embeddings=False)
    routed = one_hot([0] * len(material.held_users), 1)
    rows, _ = _windows(material, range(len(material.train_users)))
    judge = _judge(material, "lora", routed, material.held(None))
    phase = _phase(material.options, "adapters", rows, judge, material, epochs, posterior=np.ones((len(rows), 1)))
    descend(adapters, phase, *_tools(material))
    return adapters.merge(0)


def _token(material: Material, grouping: Grouping) -> Trained:
    o, clusters = material.options, grouping.selector.clusters
    model = _first(material, clusters)
    held, routed = _routed_examples(material, grouping)
    rows, owners = _windows(material, range(len(material.train_users)))
    judge = _judge(material, "token", routed, held)
    epochs = o.epochs + o.fine_tune_epochs
    posterior = grouping.posterior[owners]
    phase = _phase(o, "tokens", rows, judge, material, epochs, material.start is not None, posterior)
    descend(model, phase, *_tools(material))
    return Trained("token", clusters, [model])


def _routed_examples(material: Material, grouping: Grouping) -> tuple[list[Example], np.ndarray]:
    """The validation users' last sessions, and each visit's likeliest cluster: (B, K) one-hot."""
    held = material.held(grouping.router)
    posterior = grouping.selector.posterior([example.visit for example in held])
    return held, one_hot(posterior.argmax(axis=1).tolist(), posterior.shape[1])


def _windows(material: Material, members: Sequence[int] | range) -> tuple[list[np.ndarray], np.ndarray]:
    """Token windows of training users, by their place among them, and the place that each window belongs to."""
    rows: list[np.ndarray] = []
    owners: list[int] = []
    for place in members:
        user = int(material.train_users[place])
        own = windows_of(material.corpus, user, material.tokens, material.options.context_tokens)
        rows += own
        owners += [place] * len(own)
    return rows, np.array(owners)


def _judge(material: Material, backend: Backend, routed: np.ndarray, seen: Sequence[Example]) -> Judge:
    """Nats per token of the target sessions, given the sessions before and the cluster of each, (B, K) one-hot."""
    encode, render = material.tokenizer.encode, material.tokenizer.render
    some, clusters = seen[:MOST_JUDGES], routed.shape[1]
    budget = material.options.context_tokens - material.max_pages - 1  # as at prediction
    prompts = [render([encode(pages) for pages in recent(example.visit.sessions, budget)]) for example in some]
    targets = [encode(example.target) for example in some]
    count = sum(len(target) + 1 for target in targets)

    def loss(model: Any) -> float:
        predictor = _predictor(backend, clusters, [model], material.device, torch.float32)
        chunks = [slice(i, i + CHUNK) for i in range(0, len(prompts), CHUNK)]
        return float(sum(predictor.nll(prompts[c], routed[: len(some)][c], targets[c]).sum() for c in chunks) / count)

    def adapted_loss(adapters: Any) -> float:
        total = 0.0
        for cluster in range(clusters):
            own = np.flatnonzero(routed[: len(some), cluster]).tolist()
            with adapters.using(cluster) as trunk:  # a merged copy for each cluster might not fit the memory
                judged = LanguageModel(trunk, material.device, torch.float32)
                for i in range(0, len(own), CHUNK):
                    chunk = own[i : i + CHUNK]
                    total += float(judged.nll([prompts[row] for row in chunk], [targets[row] for row in chunk]).sum())
        return total / count

    return adapted_loss if backend == "lora" else loss


def _predictor(
    backend: Backend, clusters: int, models: Any, device: torch.device, dtype: torch.dtype | None
) -> Predictor:
    if backend == "lora":
        models = [models.merge(k) for k in range(clusters)]
    loaded = [LanguageModel(model, device, dtype) for model in models]
    return Token(loaded[0], clusters) if backend == "token" else Separate(loaded)


def _tools(material: Material) -> tuple[Any, torch.device, Any]:
    return material.store, material.device, material.progress


def _phase(
    o: TrainOptions, name: str, rows: Sequence[np.ndarray], judge: Judge, material: Material,
    epochs: int | None = None, fine_tune: bool = False, posterior: np.ndarray | None = None,
) -> Phase:  # fmt: skip
    return Phase(
        name=name, rows=rows, judge=judge, epochs=o.fine_tune_epochs if epochs is None else epochs, batch=o.batch,
        lr=o.fine_tune_lr if fine_tune else o.lr, weight_decay=o.weight_decay, patience=o.patience, seed=o.seed,
        checkpoint_steps=o.checkpoint_steps, deadline=material.deadline, keep_start=fine_tune, posterior=posterior,
        accumulate=o.accumulate, packing=o.packing, warm_up=o.warm_up_steps,
        fill=o.context_tokens if o.fill_rows else None,
    )  # fmt: skip
