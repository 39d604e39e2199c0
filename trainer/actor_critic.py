"""Actor-critic fine-tuning of a selector and its predictors: HeTLM's Algorithm 1 (spec/hetlm.md, section 1.4)."""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.language_model import LanguageModel
from trainer import ranks
from trainer.checkpoints import Position, Run, Weights
from trainer.descent import load_weights, weights
from trainer.errors import TrainingError
from trainer.losses import (
    entropy,
    expected_loss,
    hard_centroids,
    hard_critic,
    llm_loss,
    mean_distance,
    separation,
    soft_centroids,
    soft_critic,
)
from trainer.paper_options import PaperOptions
from trainer.samples import Samples

PHASE = "actor-critic"
JUDGED = 128  # validation users scored at once


class ActorCritic:
    """Trains a selector (D -> K logits) and K predictors together, in place.

    Every random draw of a step comes from the seed and the step, so a resumed run repeats an uninterrupted one.
    `sizes` has a row for the start and one for each epoch: how many training users chose each cluster.
    """

    def __init__(
        self, selector: nn.Module, predictors: Sequence[PreTrainedModel], centroids: Tensor, train: Samples,
        held: Samples, options: PaperOptions, store: Run, device: torch.device, seed: int, checkpoint_steps: int,
    ) -> None:  # fmt: skip
        self.options, self.train, self.held, self.store = options, train, held, store
        self.device, self.seed, self.checkpoint_steps = device, seed, checkpoint_steps
        self.selector, self.predictors = selector.to(device), [model.to(device) for model in predictors]
        self.whole = nn.ModuleDict({"selector": self.selector, "predictors": nn.ModuleList(self.predictors)})
        # One optimiser, but each weight has a state of its own, and AdamW leaves a weight without a gradient alone:
        # a predictor that nobody chose in a step is not even decayed.
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": list(selector.parameters()), "lr": options.selector_lr,
                    "weight_decay": options.selector_weight_decay,
                },
                {
                    "params": [weight for model in self.predictors for weight in model.parameters()],
                    "lr": options.predictor_lr, "weight_decay": options.predictor_weight_decay,
                },
            ]
        )  # fmt: skip
        self.z = train.z.to(device)
        self.tau = mean_distance(centroids) if options.l3 == "scaled" else None
        self.memory = centroids.to(device)  # soft centroids
        self.dictionary = self.memory  # hard ones
        self.per_epoch = -(-len(train.targets) // options.batch)
        self.position = Position(phase=PHASE, step=0, best_loss=math.inf, worse_epochs=0, log_bytes=0)
        self.best: Weights = {}
        self.sizes: list[list[int]] = []

    def run(self, progress: Any = None, deadline: float = math.inf) -> None:
        """Train to the end, or until `deadline` (time.monotonic()), and leave the best epoch in place."""
        done = self.store.finished(PHASE)
        if done is not None:
            self.sizes = done.pop("sizes").tolist()
            load_weights(self.whole, done)
            return
        self._resume()
        total = self.per_epoch * self.options.epochs
        task = None
        if progress is not None:
            task = progress.add_task(PHASE, total=total, completed=self.position.step, tokens_per_s=None)
        tokens, started = 0, time.perf_counter()
        while self.position.step < total and time.monotonic() < deadline:
            epoch = self.position.step // self.per_epoch
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train.targets))
            for i in range(self.position.step % self.per_epoch * self.options.batch, len(order), self.options.batch):
                tokens += self.step(order[i : i + self.options.batch].tolist(), epoch)
                if task is not None:
                    speed = tokens / (time.perf_counter() - started)
                    progress.update(task, advance=1, tokens_per_s=speed)
                if time.monotonic() > deadline:
                    break
                if self.position.step % self.checkpoint_steps == 0 and self.position.step % self.per_epoch:
                    self._save()
            self._judge(epoch)
            self._save()
        load_weights(self.whole, self.best)
        self.store.finish(PHASE, {**self.best, "sizes": torch.tensor(self.sizes)})

    def step(self, rows: Sequence[int], epoch: int) -> int:
        """One pass of Algorithm 1's loop over a batch of users; the number of tokens that every predictor scored."""
        options, started = self.options, time.perf_counter()
        torch.manual_seed((self.seed * 1_000_003 + self.position.step) % 2**63)
        self.whole.train()
        z = self.z[rows]
        logits = self.selector(z)
        clusters = logits.argmax(1)
        tokens, scored = self.train.batch(rows, options.loss_on, self.device)
        self.optimizer.zero_grad()
        columns: list[Tensor] = []
        critic: list[float | None] = []
        for k, model in enumerate(self.predictors):
            hard = options.critic == "hard"
            learns = clusters == k if hard else torch.ones_like(clusters, dtype=torch.bool)
            column = self._losses(model, tokens, scored, learns)
            columns.append(column.detach())
            critic.append(None)
            if learns.any():
                part = hard_critic(column, learns) if hard else soft_critic(column, logits.softmax(1)[:, k])
                part.backward()
                nn.utils.clip_grad_norm_(model.parameters(), options.clip)
                critic[k] = float(part.detach())
        losses = torch.stack(columns, dim=1)
        if not losses.isfinite().all():
            raise TrainingError(
                f"{PHASE}, step {self.position.step}: the loss is no finite number. Lower paper.predictor_lr."
            )
        line = self._actor(logits, losses, z)
        self.optimizer.step()
        own = losses.gather(1, clusters[:, None]).squeeze(1)
        counts = scored.sum(1)
        count = int(counts.sum())
        nats = own * counts if options.reduction == "mean" else own
        head = {"phase": PHASE, "epoch": epoch, "step": self.position.step, "loss": float(nats.sum()) / count}
        told = {"lr": options.predictor_lr, "critic": critic, **line, "sizes": self._sizes(clusters)}
        speed = round(count / (time.perf_counter() - started))
        self.store.log({**head, **told, "tokens": count, "tokens_per_s": speed})
        self.position.step += 1
        return count

    def clusters(self, z: Tensor) -> Tensor:
        """The cluster that the selector chooses for each row of z (N, D): (N,)."""
        self.selector.eval()
        with torch.no_grad():
            chosen: Tensor = self.selector(z.to(self.device)).argmax(1)
        return chosen

    def _losses(self, model: PreTrainedModel, tokens: Tensor, scored: Tensor, learns: Tensor) -> Tensor:
        """L_LLM of one predictor on every sample (B,), with a gradient where it learns from it."""
        column = torch.zeros(len(tokens), device=self.device)
        for rows, graded in ((learns, True), (~learns, False)):
            if not rows.any():
                continue
            with torch.set_grad_enabled(graded), self._autocast():
                states = model.base_model(input_ids=tokens[rows, :-1], use_cache=False)[0]
                logits = model.get_output_embeddings()(states[scored[rows]]).float()
            losses = llm_loss(logits, tokens[rows, 1:], scored[rows], self.options.reduction)
            column = column.masked_scatter(rows, losses)
        return column

    def _actor(self, logits: Tensor, losses: Tensor, z: Tensor) -> dict[str, float]:
        """The gradient of L_O = L_1 + alpha L_2 + beta L_3 in the selector, and what the log tells of it."""
        options = self.options
        if options.dictionary == "soft":
            centroids, alive = soft_centroids(logits, z, self.memory, options.memory)
            self.memory = centroids.detach()
        else:
            centroids, alive = self.dictionary, torch.ones(logits.shape[1], dtype=torch.bool, device=self.device)
        terms = (expected_loss(logits, losses), entropy(logits), separation(centroids, alive, self.tau))
        slopes = [
            torch.autograd.grad(term, logits, retain_graph=True)[0] if term.requires_grad else torch.zeros_like(logits)
            for term in terms
        ]
        logits.backward(slopes[0] + options.alpha * slopes[1] + options.beta * slopes[2])
        nn.utils.clip_grad_norm_(self.selector.parameters(), options.clip)
        l1, l2, l3 = (float(term.detach()) for term in terms)
        return {"objective": l1 + options.alpha * l2 + options.beta * l3, "l1": l1, "l2": l2, "l3": l3} | {
            f"slope{i}": float(slope.norm()) for i, slope in enumerate(slopes, 1)
        }

    def _judge(self, epoch: int) -> None:
        """Sizes and hard centroids over the training users; nats per token of the validation targets."""
        chosen = self.clusters(self.z)
        self.dictionary = hard_centroids(self.z, chosen, self.dictionary)
        self.sizes.append(self._sizes(chosen))
        held, nats = self.clusters(self.held.z).tolist(), 0.0
        for k, model in enumerate(self.predictors):
            rows = [row for row, cluster in enumerate(held) if cluster == k]
            for i in range(0, len(rows), JUDGED):
                some = rows[i : i + JUDGED]
                prompts, targets = ([part[row] for row in some] for part in (self.held.prompts, self.held.targets))
                nats += float(LanguageModel(model, self.device, torch.float32).nll(prompts, targets).sum())
        loss = nats / sum(len(target) + 1 for target in self.held.targets)
        head = {"phase": PHASE, "epoch": epoch, "step": self.position.step}
        self.store.log({**head, "validation_loss": loss, "sizes": self.sizes[-1]})
        if loss < self.position.best_loss:
            self.position.best_loss, self.best = loss, weights(self.whole)

    def _save(self) -> None:
        names: dict[Tensor, str] = {weight: name for name, weight in self.whole.named_parameters()}
        state = self.optimizer.state
        moments = {f"{names[weight]}:{key}": value for weight, kept in state.items() for key, value in kept.items()}
        centroids = {"memory": self.memory, "dictionary": self.dictionary, "sizes": torch.tensor(self.sizes)}
        tensors = {"model": weights(self.whole), "best": self.best, "optimizer": moments, "centroids": centroids}
        self.store.checkpoint(self.position, tensors)

    def _resume(self) -> None:
        """Go on from the checkpoint, if there is one of this phase."""
        if self.store.position is None or self.store.position.phase != PHASE:
            self.sizes, self.best = [self._sizes(self.clusters(self.z))], weights(self.whole)
            return
        self.position = self.store.position
        load_weights(self.whole, self.store.restore("model"))
        self.best, centroids = self.store.restore("best"), self.store.restore("centroids")
        self.memory, self.dictionary = (centroids[name].to(self.device) for name in ("memory", "dictionary"))
        self.sizes = centroids["sizes"].tolist()
        parameters = dict(self.whole.named_parameters())
        for place, value in self.store.restore("optimizer").items():
            name, key = place.rsplit(":", 1)
            self.optimizer.state[parameters[name]][key] = value if key == "step" else value.to(self.device)
        ranks.wait()  # until all have read the checkpoint

    def _sizes(self, clusters: Tensor) -> list[int]:
        return torch.bincount(clusters, minlength=len(self.predictors)).tolist()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
