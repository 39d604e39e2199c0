"""Gradient descent for one phase: a language model on token windows, judged on held-out sessions each epoch."""

import math
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.language_model import LanguageModel, pad
from models.vocabulary import BOS, PAD
from trainer.checkpoints import Position, Run, Weights
from trainer.windows import batch_count, batches

BETAS = (0.9, 0.98)
WARM_UP = 0.05  # share of the steps
FLOOR = 0.05  # share of the rate that is left at the end of the cosine
CLIP = 1.0

Judge = Callable[[LanguageModel], float]


@dataclass(frozen=True)
class Phase:
    """One phase of a run: `rows` are token windows, `judge` gives the validation loss in nats per token."""

    name: str
    rows: Sequence[np.ndarray]
    judge: Judge
    epochs: int
    batch: int
    lr: float
    weight_decay: float
    patience: int
    seed: int
    checkpoint_steps: int
    deadline: float  # time.monotonic()
    keep_start: bool  # the model that the phase starts from may win


def descend(model: PreTrainedModel, phase: Phase, run: Run, device: torch.device, progress: Any = None) -> float:
    """Train `model` in place and leave the best epoch's weights in it; returns their validation loss.

    Every random draw of a step comes from (seed, phase, step), so a resumed run repeats an uninterrupted one.
    """
    done = run.finished(phase.name)
    if done is not None:
        load_weights(model, done)
        return phase.judge(wrap(model, device))
    model.to(device)
    return _Descent(model, phase, run, device, progress).run()


class _Descent:
    def __init__(self, model: PreTrainedModel, phase: Phase, run: Run, device: torch.device, progress: Any) -> None:
        self.model, self.phase, self.store, self.device, self.progress = model, phase, run, device, progress
        self.per_epoch = batch_count(len(phase.rows), phase.batch)
        self.total = self.per_epoch * phase.epochs
        self.key = zlib.crc32(phase.name.encode())
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=phase.lr, betas=BETAS, weight_decay=phase.weight_decay, fused=True
        )
        self.position = Position(phase.name, 0, math.inf, 0, 0)
        self.best: Weights = {}
        if run.position is not None and run.position.phase == phase.name:
            self.position = run.position
            load_weights(model, run.restore("model"))
            self.best = run.restore("best")
            self._load_optimizer(run.restore("optimizer"))
        else:
            self.best = weights(model)
            if phase.keep_start:
                self.position.best_loss = phase.judge(wrap(model, device))

    def run(self) -> float:
        phase, position = self.phase, self.position
        task = None
        if self.progress is not None:
            task = self.progress.add_task(phase.name, total=self.total, completed=position.step)
        while position.step < self.total and position.worse_epochs < phase.patience:
            epoch, offset = divmod(position.step, self.per_epoch)
            lengths = [len(row) for row in phase.rows]
            for i, rows in enumerate(batches(lengths, phase.batch, (phase.seed, self.key, epoch))):
                if i < offset:
                    continue
                if time.monotonic() > phase.deadline:
                    return self.end(task, judge=i > 0)
                self.step(rows, epoch)
                if task is not None:
                    self.progress.update(task, advance=1)
                if position.step % phase.checkpoint_steps == 0 and position.step % self.per_epoch:
                    self.save()
            self.judge(epoch)
            self.save()
        return self.end(task)

    def step(self, rows: np.ndarray, epoch: int) -> None:
        phase, position = self.phase, self.position
        torch.manual_seed((phase.seed * 1_000_003 + self.key + position.step) % 2**63)
        rate = phase.lr * schedule(position.step, self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        started = time.perf_counter()
        self.model.train()
        tokens, _ = pad([phase.rows[row] for row in rows.tolist()], self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, count = session_loss(self.model, tokens)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        seconds = time.perf_counter() - started
        line = {"phase": phase.name, "epoch": epoch, "step": position.step, "loss": loss.item(), "lr": rate}
        self.store.log({**line, "tokens": count, "tokens_per_s": round(count / seconds)})
        position.step += 1

    def judge(self, epoch: int) -> None:
        loss = self.phase.judge(wrap(self.model, self.device))
        self.store.log({"phase": self.phase.name, "epoch": epoch, "validation_loss": loss})
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
        self.store.checkpoint(
            self.position, {"model": weights(self.model), "best": self.best, "optimizer": self._optimizer_tensors()}
        )

    def _optimizer_tensors(self) -> Weights:
        names = [name for name, _ in self.model.named_parameters()]
        state = self.optimizer.state_dict()["state"]
        return {f"{names[i]}:{key}": value for i, values in state.items() for key, value in values.items()}

    def _load_optimizer(self, tensors: Weights) -> None:
        index = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        state: dict[int, Weights] = {}
        for place, value in tensors.items():
            name, key = place.rsplit(":", 1)
            state.setdefault(index[name], {})[key] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def session_loss(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, int]:
    """Mean nats per predicted token, and their number; padding and the sure [BOS] after [EOS] do not count."""
    labels = tokens[:, 1:]
    scored = (labels != PAD) & (labels != BOS)
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits[scored], labels[scored]), int(scored.sum())


def schedule(step: int, total: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to 5 %."""
    warm = max(1, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / warm
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def weights(model: PreTrainedModel) -> Weights:
    """A copy of the parameters by name; tied ones once."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}


def load_weights(model: PreTrainedModel, values: Weights) -> None:
    """Set the parameters from `weights`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def wrap(model: PreTrainedModel, device: torch.device) -> LanguageModel:
    """The model for scoring, in the precision it is trained in."""
    return LanguageModel(model, device, torch.float32)
