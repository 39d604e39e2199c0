"""The decoder: prefill prompts once, roll out many sessions of each, all clusters of a batch together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.attention import RolloutCache
from models.engine_graphs import CudaGraphs, Direct, Graphs, Stepper
from models.engine_lanes import Lanes
from models.engine_waves import CPU, Branch, Pace, on_gpu, row_rung, rung, waves, width_rung
from models.language_model import Ensemble, Network, pad
from models.specials import BOS, EOS, UNK


class Rollouts(NamedTuple):
    """What R sampled sessions and the greedy one say of B visits."""

    marginals: np.ndarray  # (B, V) probability that the next session holds the page
    groups: np.ndarray  # (B, G) probability that it holds at least one page of the group
    sequences: np.ndarray  # (B, R, S) sampled tokens, [EOS] after the end
    paths: list[list[int]]  # greedy tokens, without [EOS]


class Engine:
    """Rolls out branches. The result of a branch does not depend on the others, but for float noise."""

    def __init__(self, models: Ensemble, pace: Pace | None = None, stepper: Stepper | None = None) -> None:
        gpu = models.device.type == "cuda"
        self.models = models
        self.pace = pace or (on_gpu(models.device) if gpu else CPU)
        self.stepper = stepper or (Graphs(CudaGraphs()) if gpu and models.stacked else Direct())

    @torch.inference_mode()
    def rollouts(self, branches: Sequence[Branch], draws: np.ndarray, groups: np.ndarray) -> Rollouts:
        """The rollouts of all branches, gathered by visit: `draws` (B, R, S) uniforms, `groups` (G, V) marked pages."""
        visits, samples, steps = draws.shape
        size = self.models.size
        out = Rollouts(
            np.zeros((visits, size), dtype=np.float32),
            np.zeros((visits, len(groups)), dtype=np.float32),
            np.full((visits, samples, steps), EOS, dtype=np.int64),
            [[] for _ in range(visits)],
        )
        marks = torch.as_tensor(groups[:, :size].T, dtype=torch.float32, device=self.models.device).contiguous()
        for first, last, rows in waves(branches, steps, self.models, self.pace):
            _Wave(self, self.models.part(first, last), rows, draws, marks, out).run()
        if samples:
            for total in (out.marginals, out.groups):
                np.clip(total / samples, 0.0, 1.0, out=total)
            out.marginals[:, : UNK + 1] = 0.0
        return out


class _Wave:
    """One wave: k clusters, n rows each (some of them empty), C columns each; column 0 is the greedy session."""

    def __init__(
        self,
        engine: Engine,
        network: Network,
        rows: list[list[Branch]],
        draws: np.ndarray,
        marks: Tensor,
        out: Rollouts,
    ) -> None:
        self.engine, self.network, self.out = engine, network, out
        self.clusters, self.steps, device = len(rows), draws.shape[2], network.device
        count = max(map(len, rows))
        count = row_rung(count) if engine.stepper.static else count
        self.branches: list[Branch | None] = [
            branch for part in rows for branch in [*part, *[None] * (count - len(part))]
        ]
        columns = 1 + max(len(branch.rollouts) for part in rows for branch in part)
        absent = np.ones((len(self.branches), columns), dtype=bool)
        own = np.zeros((len(self.branches), columns, self.steps), dtype=np.float32)
        for row, branch in enumerate(self.branches):
            if branch is not None:
                absent[row, 0] = not branch.greedy
                absent[row, 1 : 1 + len(branch.rollouts)] = False
                own[row, 1 : 1 + len(branch.rollouts)] = draws[branch.visit, branch.rollouts]
        tokens, lengths = pad([branch.prompt if branch is not None else [BOS] for branch in self.branches], device)
        slots = max(self.steps - 1, 1)
        if engine.stepper.static:  # and places in multiples of 8, which the fused kernels want
            tokens = torch.nn.functional.pad(tokens, (0, width_rung(*tokens.shape) - tokens.shape[1]))
            slots = -(-slots // 8) * 8
        logits, prompts = network.prefill(tokens.view(self.clusters, count, -1), lengths)
        cache = RolloutCache.start(
            prompts, lengths, network.heads, columns, slots, engine.stepper.room, engine.stepper.static
        )
        self.lanes = Lanes.start(
            logits, torch.as_tensor(own, device=device), torch.as_tensor(absent, device=device), marks, lengths, cache
        )
        self.rows = torch.arange(len(self.branches), device=device)
        self.slots = torch.arange(columns, device=device).expand(len(self.branches), -1)
        self.sequences = torch.full((*absent.shape, self.steps), EOS, device=device)
        self.sums = torch.zeros(len(self.branches), self.lanes.sums.shape[1], device=device)
        self.hits = torch.zeros(len(self.branches), self.lanes.hits.shape[1], device=device)

    def run(self) -> None:
        """Step until every rollout has ended, then give what they say to the visits."""
        pace, stepper = self.engine.pace, self.engine.stepper
        if self.steps > 1 and not bool(self.lanes.ended.all()):
            self.lanes = stepper.load(self.network, self.lanes)
            for filled in range(1, self.steps):
                stepper.step(filled)
                if filled % pace.check == 0 and filled + 1 < self.steps:
                    alive = self.lanes.ended.numel() - int(self.lanes.ended.sum())
                    if alive == 0:
                        break
                    if alive < pace.compact * self.lanes.ended.numel():
                        self.compact(filled)
        self.flush()
        self.give()

    def compact(self, filled: int) -> None:
        """Drop rows and columns in which nothing goes on; the greedy column stays first, clusters stay equal."""
        going = ~self.lanes.ended
        alive = going.any(1).view(self.clusters, -1)
        ladder = self.engine.stepper.static
        count = int(alive.sum(1).max())
        count = min(rung(count), alive.shape[1]) if ladder else count
        order = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]
        rows = (order + torch.arange(self.clusters, device=order.device)[:, None] * alive.shape[1]).flatten()
        priority = going[rows].to(torch.int8)
        priority[:, 0] = 2
        width = int((priority > 0).sum(1).max())
        width = min(rung(width), going.shape[1]) if ladder else width
        if len(rows) * width > self.engine.pace.compact * going.numel():
            return
        columns = priority.argsort(dim=1, descending=True, stable=True)[:, :width]
        self.flush()
        self.rows, self.slots = self.rows[rows], self.slots[rows[:, None], columns]
        self.lanes = self.engine.stepper.load(self.network, self.lanes.keep(rows, columns, filled))

    def flush(self) -> None:
        """Write down what the lanes hold."""
        self.sequences[self.rows[:, None], self.slots] = self.lanes.sequences
        self.sums[self.rows] += self.lanes.sums
        self.hits[self.rows] += self.lanes.hits

    def give(self) -> None:
        """Hand each visit its branch's part."""
        sums, hits, sequences = self.sums.cpu().numpy(), self.hits.cpu().numpy(), self.sequences.cpu().numpy()
        for row, branch in enumerate(self.branches):
            if branch is None:
                continue
            if len(branch.rollouts):
                self.out.marginals[branch.visit] += sums[row]
                self.out.groups[branch.visit] += hits[row]
                self.out.sequences[branch.visit, branch.rollouts] = sequences[row, 1 : 1 + len(branch.rollouts)]
            if branch.greedy:
                path = sequences[row, 0].tolist()
                self.out.paths[branch.visit][:] = path[: path.index(EOS)] if EOS in path else path
