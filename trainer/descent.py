"""Gradient descent for one phase: a language model on token windows, judged on held-out sessions each epoch."""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.adapters import Adapters
from models.vocabulary import BOS
from trainer import ranks
from trainer.checkpoints import Position, Run, Weights, load_optimizer, optimizer_tensors
from trainer.errors import TrainingError
from trainer.likelihood import Learner, nats
from trainer.windows import Layout, batch_count, batches, draw_clusters, lay_out, pack

BETAS = (0.9, 0.98)
WARM_UP = 0.05  # share of the steps, unless a phase says how many
FLOOR = 0.05  # share of the rate that is left at the end of the cosine
CLIP = 1.0

Judge = Callable[[Any], float]


@dataclass(frozen=True)
class Phase:
    """One phase of a run: `rows` are token windows, `judge` gives the model's validation loss in nats per token.

    With a `posterior` (rows, K) each row belongs to a cluster, drawn anew every epoch; one-hot rows always to the same.
    A model with Adapters meets it with the adapter of its cluster; any other as a row that begins with the cluster's
    token, V + k, where V + K is the size of its vocabulary. Cluster tokens are never predicted.
    """

    name: str
    rows: Sequence[np.ndarray]
    judge: Judge
    epochs: int
    batch: int  # rows; with `fill` rows of so many tokens
    lr: float
    weight_decay: float
    patience: int
    seed: int
    checkpoint_steps: int
    deadline: float  # time.monotonic()
    keep_start: bool  # the model that the phase starts from may win
    posterior: np.ndarray | None = None
    accumulate: int = 1  # batches a step
    packing: bool = True  # windows share rows, so batches are of any lengths; else of similar ones
    warm_up: int | None = None  # steps
    fill: int | None = None  # tokens: each batch is of rows so long, with as many windows in each as find room


def descend(model: Learner, phase: Phase, run: Run, device: torch.device, progress: Any = None) -> float:
    """Train `model` in place and leave the best epoch's weights in it; returns their validation loss.

    Every random draw of a step comes from (seed, phase, step), so a resumed run repeats an uninterrupted one. With
    several processes each computes its share of every batch. Raises TrainingError when the loss is no number.
    """
    done = run.finished(phase.name)
    model.to(device)
    if done is not None:
        load_weights(model, done)
        return judged(model, phase)
    return _Descent(model, phase, run, device, progress).run()


class _Descent:
    def __init__(self, model: Learner, phase: Phase, run: Run, device: torch.device, progress: Any) -> None:
        self.model, self.phase, self.store, self.device, self.progress = model, phase, run, device, progress
        self.units_a_step = phase.batch * phase.accumulate
        # Windows that come together: the same in all epochs, so that each has the same number of steps.
        lengths = [len(row) - 1 for row in phase.rows]
        self.units = pack(lengths, room=phase.fill) if phase.fill else [[i] for i in range(len(phase.rows))]
        self.per_epoch = batch_count(len(self.units), self.units_a_step)
        self.total = self.per_epoch * phase.epochs
        self.key = zlib.crc32(phase.name.encode())
        self.lengths = [sum(lengths[i] for i in unit) for unit in self.units]
        self.scored = np.array(
            [sum(int((phase.rows[i] != BOS).sum()) for i in unit) for unit in self.units], dtype=np.int64
        )  # every token but [BOS] is predicted
        self.optimizer = torch.optim.AdamW(groups(model, phase.weight_decay), lr=phase.lr, betas=BETAS, fused=True)
        self.position = Position(phase.name, 0, math.inf, 0, 0)
        self.best: Weights = {}
        if run.position is not None and run.position.phase == phase.name:
            self.position = run.position
            load_weights(model, run.restore("model"))
            self.best = run.restore("best")
            load_optimizer(self.optimizer, model, run.restore("optimizer"))
        else:
            self.best = weights(model)
            if phase.keep_start:
                self.position.best_loss = judged(model, phase)
        ranks.wait()  # until all have read the checkpoint

    def run(self) -> float:
        phase, position = self.phase, self.position
        task = None
        if self.progress is not None:
            task = self.progress.add_task(phase.name, total=self.total, completed=position.step, tokens_per_s=None)
        tokens, started = 0, time.perf_counter()
        while position.step < self.total and position.worse_epochs < phase.patience:
            epoch, offset = divmod(position.step, self.per_epoch)
            clusters = self.clusters(epoch)
            order = batches(self.lengths, self.units_a_step, (phase.seed, self.key, epoch), not phase.packing)
            for i, units in enumerate(order):
                if i < offset:
                    continue
                if ranks.from_first(time.monotonic() > phase.deadline):
                    return self.end(task, judge=i > 0)
                tokens += self.step(units, clusters, epoch)
                if task is not None:
                    speed = tokens / (time.perf_counter() - started)
                    self.progress.update(task, advance=1, tokens_per_s=speed)
                if position.step % phase.checkpoint_steps == 0 and position.step % self.per_epoch:
                    self.save()
            self.judge(epoch)
            self.save()
        return self.end(task)

    def step(self, units: np.ndarray, clusters: np.ndarray | None, epoch: int) -> int:
        """One update on these windows; returns the number of tokens that were predicted."""
        phase, position = self.phase, self.position
        rate = phase.lr * schedule(position.step, self.total, phase.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        self.model.train()
        self.optimizer.zero_grad()
        count = int(self.scored[units].sum())
        loss = torch.zeros((), device=self.device)
        for i, (layout, kinds) in enumerate(self.shares(units, clusters)):
            torch.manual_seed(self.dropout_seed(i))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                share = nats(self.model, layout, self.device, kinds) / count
            share.backward()
            loss += share.detach()
        ranks.add_up([loss, *gradients(self.model)])
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP))
        line = {"phase": phase.name, "epoch": epoch, "step": position.step, "loss": loss.item(), "lr": rate}
        if not math.isfinite(norm):
            raise TrainingError(
                f"phase {phase.name}, step {position.step}: the loss is {line['loss']} and its gradient {norm}, so "
                f"nothing can be learnt from here on. Lower the learning rate ({phase.lr})."
            )
        self.optimizer.step()
        speed = round(count / (time.perf_counter() - started))
        self.store.log({**line, "grad_norm": norm, "tokens": count, "tokens_per_s": speed})
        position.step += 1
        return count

    def shares(self, units: np.ndarray, clusters: np.ndarray | None) -> Iterator[tuple[Layout, np.ndarray | None]]:
        """This process's share of each batch of the step, and the adapter of each of its rows."""
        for start in range(0, len(units), self.phase.batch):
            batch = np.concatenate([self.units[unit] for unit in units[start : start + self.phase.batch].tolist()])
            windows = [self.phase.rows[row] for row in batch.tolist()]
            kinds = None
            if clusters is not None and isinstance(self.model, Adapters):
                kinds = clusters[batch]
            elif clusters is not None:
                windows = [np.concatenate([[c], row]) for c, row in zip(clusters[batch], windows, strict=True)]
            placed = [[i] for i in range(len(windows))]
            if self.phase.packing:
                placed = pack([len(window) - 1 for window in windows], kinds, self.phase.fill)
            if mine := placed[ranks.rank() :: ranks.world()]:
                yield lay_out(windows, mine), None if kinds is None else kinds[[row[0] for row in mine]]

    def clusters(self, epoch: int) -> np.ndarray | None:
        """Adapter or token of each row in this epoch: (rows,)."""
        posterior = self.phase.posterior
        if posterior is None:
            return None
        drawn = draw_clusters(posterior, (self.phase.seed, self.key, epoch, 1))
        tokens = 0 if isinstance(self.model, Adapters) else self.model.config.vocab_size - posterior.shape[1]
        return drawn + int(tokens)

    def dropout_seed(self, share: int) -> int:
        place = (self.phase.seed, self.key, self.position.step, share, ranks.rank())
        return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))

    def judge(self, epoch: int) -> None:
        loss = judged(self.model, self.phase)
        self.store.log({"phase": self.phase.name, "epoch": epoch, "step": self.position.step, "validation_loss": loss})
        if loss < self.position.best_loss:
            self.position.best_loss, self.position.worse_epochs = loss, 0
            self.best = weights(self.model)
        else:
            self.position.worse_epochs += 1

    def end(self, task: Any, judge: bool = False) -> float:
        if judge:
            self.judge(self.position.step // self.per_epoch)
        if task is not None:
            self.progress.update(task, completed=self.total)
        load_weights(self.model, self.best)
        self.store.finish(self.phase.name, self.best)
        return self.position.best_loss

    def save(self) -> None:
        optimizer = optimizer_tensors(self.optimizer, self.model)
        self.store.checkpoint(self.position, {"model": weights(self.model), "best": self.best, "optimizer": optimizer})


def judged(model: Learner, phase: Phase) -> float:
    """The validation loss as the first process finds it, in all of them."""
    return ranks.from_first(phase.judge(model) if ranks.rank() == 0 else 0.0)


def groups(model: Learner, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that learn; biases and norms, which have one dimension, do not decay."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() < 2], "weight_decay": 0.0},
    ]


def gradients(model: Learner) -> list[Tensor]:
    """Gradients of the parameters that learn; zeros where this process had no share of the step."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def schedule(step: int, total: int, warm_up: int | None = None) -> float:
    """Linear warm-up over so many steps, or 5 % of them, then a cosine down to 5 %."""
    warm = max(1, round(WARM_UP * total) if warm_up is None else min(warm_up, total))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def weights(model: Learner) -> Weights:
    """A copy of the parameters that learn, by name; tied ones once."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters() if value.requires_grad}


def load_weights(model: Learner, values: Weights) -> None:
    """Set the parameters from `weights`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(values[name])
