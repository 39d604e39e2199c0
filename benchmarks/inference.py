"""The paper's Table 17, 10,000 next sessions, beside transformers' generate. `python -m benchmarks.inference`

Random weights of the true sizes; the answer's quality does not matter here. Needs torch, transformers and numpy only.
"""

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, OPTConfig, PretrainedConfig
from transformers.utils.logging import set_verbosity_error

from models.language_model import LanguageModel, from_config
from models.predictors import Separate, one_hot
from models.specials import BOS, EOS, PAD, UNK

PAPER_S = {"one small": 110.95, "3 clusters": 140.55, "6 clusters": 194.86, "one large": 363.71}


def opt(hidden: int, layers: int, heads: int, vocabulary: int, **changes: Any) -> PretrainedConfig:
    return OPTConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        ffn_dim=4 * hidden, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        **{"word_embed_proj_dim": hidden, "max_position_embeddings": 2048} | changes,
    )  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A job: prompts of log-normal length, `steps` tokens each."""

    small: PretrainedConfig
    large: PretrainedConfig
    sessions: int
    sampled_sessions: int
    median_prompt: int
    longest_prompt: int
    steps: int
    batch: int  # of generate


SIZES = {
    # OPT-350M and OPT-2.7B with the 1,123 pages of Dataset I.
    "paper": Size(
        opt(1024, 24, 16, 1127, word_embed_proj_dim=512, do_layer_norm_before=False),
        opt(2560, 32, 32, 1127), 10_000, 1_000, 130, 496, 16, 256,
    ),
    "ci": Size(opt(64, 2, 4, 167), opt(128, 4, 4, 167), 256, 32, 60, 160, 12, 64),
    "ci-256": Size(opt(256, 4, 8, 1000), opt(384, 6, 8, 1000), 64, 8, 60, 160, 12, 32),
}  # fmt: skip


class Bench:
    def __init__(self, size: Size, device: torch.device, sessions: int, repeats: int) -> None:
        self.size, self.device, self.repeats = size, device, repeats
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(np.log(size.median_prompt), 0.5, size=sessions)).astype(int)
        lengths = lengths.clip(4, size.longest_prompt)
        self.prompts = [[BOS, *rng.integers(4, size.small.vocab_size, size=n - 3), EOS, BOS] for n in lengths.tolist()]
        self.prompts = [[int(token) for token in prompt] for prompt in self.prompts]
        self.clusters = rng.integers(0, 6, size=sessions)
        self.bandwidth, self.flops = self.limits()

    def seconds(self, *works: Callable[[], Any]) -> list[tuple[float, float]]:
        """Of each: the best of some runs, taken in turn, and the first one, which warms up."""
        found: list[list[float]] = [[] for _ in works]
        for _ in range(self.repeats + 1):
            for work, times in zip(works, found, strict=True):
                self.wait()
                began = time.perf_counter()
                work()
                self.wait()
                times.append(time.perf_counter() - began)
        return [(min(times[1:]), times[0]) for times in found]

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def limits(self) -> tuple[float, float]:
        """What this device reaches: bytes read and written by a big copy, FLOP of a big matrix product, a second."""
        gpu = self.device.type == "cuda"
        source = torch.empty(2**30 if gpu else 2**26, dtype=torch.float32, device=self.device).normal_()
        target = torch.empty_like(source)
        copied = 2 * source.numel() * 4 / self.seconds(lambda: target.copy_(source))[0][0]
        side = 8192 if gpu else 1024
        matrix = torch.randn(side, side, dtype=self.dtype, device=self.device)
        return copied, 2 * side**3 / self.seconds(lambda: matrix @ matrix)[0][0]

    def models(self, config: PretrainedConfig, count: int) -> list[LanguageModel]:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                return [LanguageModel(from_config(config), self.device) for _ in range(count)]
        finally:
            torch.set_default_dtype(before)

    def table(self, jobs: Sequence[tuple[str, PretrainedConfig, int]]) -> list[dict[str, Any]]:
        """Greedy next sessions of all prompts, for each (name, model, clusters); the first is what others are
        compared with."""
        works: list[Callable[[], Any]] = []
        for _, config, clusters in jobs:
            predictor = Separate(self.models(config, clusters))
            routed = (self.clusters % clusters).tolist()
            for steps in (1, self.size.steps):
                works.append(functools.partial(predictor.greedy, self.prompts, routed, steps))
            gc.collect()
        times = self.seconds(*works)
        rows = [
            self.row(job, prefill, whole) for job, prefill, whole in zip(jobs, times[::2], times[1::2], strict=True)
        ]
        for row in rows:
            row["times_one"] = row["seconds"] / rows[0]["seconds"]
        return rows

    def row(
        self, job: tuple[str, PretrainedConfig, int], prefill: tuple[float, float], whole: tuple[float, float]
    ) -> dict[str, Any]:
        """One row: what it took, beside the arithmetic and the traffic that it cannot do without."""
        name, config, clusters = job
        steps, bytes_each = self.size.steps, torch.finfo(self.dtype).bits // 8
        decode_s = whole[0] - prefill[0]  # on a busy machine the noise can exceed it
        hidden, layers = config.hidden_size, config.num_hidden_layers
        weights = layers * (4 * hidden + 2 * config.ffn_dim) * hidden
        tokens = np.array([len(prompt) for prompt in self.prompts], dtype=np.float64)
        # The last layer needs keys and values of all tokens, the rest of it at the last token only.
        each = 2.0 * (weights * (layers - 1) / layers + 2 * hidden**2)
        flop = (each * tokens + 2.0 * (layers - 1) * hidden * tokens**2).sum()
        # Each step reads a session's keys and values once; weights are read at least once a step.
        read = 2 * layers * hidden * bytes_each * (tokens * (steps - 1) + steps * (steps - 1) / 2).sum()
        read += (steps - 1) * clusters * weights * bytes_each
        return {
            "job": name, "million_weights": round(weights * clusters / 1e6, 2), "seconds": whole[0],
            "first_run_s": whole[1], "sessions_per_s": len(tokens) / whole[0], "prefill_s": prefill[0],
            "decode_s": decode_s, "prefill_mfu": flop / prefill[0] / self.flops,
            "decode_mbu": read / decode_s / self.bandwidth if decode_s > 0 else 0.0,
        }  # fmt: skip

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
        """transformers' generate, batches of like length, padded on the left."""
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        out: list[list[int]] = [[] for _ in prompts]
        batch = max(1, self.size.batch // how.get("num_return_sequences", 1))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(prompts[row]) for row in rows)
            tokens = torch.tensor([[PAD] * (longest - len(prompts[row])) + list(prompts[row]) for row in rows])
            mask = torch.tensor([[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
            made = model.generate(
                tokens.to(self.device), attention_mask=mask.to(self.device), max_new_tokens=self.size.steps,
                suppress_tokens=[PAD, BOS, UNK], begin_suppress_tokens=[EOS], **how,
            )[:: how.get("num_return_sequences", 1), longest:]  # fmt: skip
            for row, path in zip(rows, made.tolist(), strict=True):
                out[row] = path[: path.index(EOS)] if EOS in path else path
        return out

    def beside_generate(self, sessions: int, rollouts: int) -> list[dict[str, Any]]:
        """The same model, the same sessions: greedy, and so many rollouts of each of some sessions."""
        lm = self.models(self.size.small, 1)[0]
        predictor = Separate([lm])
        plain = AutoModelForCausalLM.from_config(self.size.small, attn_implementation="sdpa", dtype=self.dtype)
        plain = plain.to(self.device).eval()
        plain.load_state_dict(lm.model.state_dict())
        asked, few = self.prompts[:sessions], self.prompts[: self.size.sampled_sessions]
        routed, steps = [0] * sessions, self.size.steps
        draws = np.random.default_rng(1).random((len(few), rollouts, steps), dtype=np.float32)
        groups, picks = np.zeros((0, lm.size), dtype=np.float32), np.zeros(len(few))
        jobs: list[tuple[str, int, Callable[[], Any], Callable[[], Any]]] = [
            ("greedy", sessions, lambda: predictor.greedy(asked, routed, steps),
             lambda: self.generate(plain, asked, do_sample=False)),
            (f"{rollouts} rollouts", len(few),
             lambda: predictor.rollouts(few, one_hot([0] * len(few), 1), draws, groups, picks),
             lambda: self.generate(plain, few, do_sample=True, top_k=0, num_return_sequences=rollouts)),
        ]  # fmt: skip
        rows = []
        for name, count, ours, theirs in jobs:
            (engine_s, _), (generate_s, _) = self.seconds(ours, theirs)
            row = {"job": name, "sessions": count, "engine_s": engine_s, "generate_s": generate_s}
            rows.append(row | {"times_as_fast": generate_s / engine_s})
        agree = [a == b for a, b in zip(predictor.greedy(asked, routed, steps), jobs[0][3](), strict=True)]
        rows[0]["same_sessions"] = float(np.mean(agree))
        return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--size", choices=list(SIZES), help="paper on CUDA, ci on a CPU")
    arguments.add_argument("--sessions", type=int, help="instead of the size's own")
    arguments.add_argument("--generate-sessions", type=int, help="how many of them generate does greedily; all")
    arguments.add_argument("--rollouts", type=int, default=32)
    arguments.add_argument("--repeats", type=int, default=2, help="the best counts")
    given = arguments.parse_args()
    set_verbosity_error()
    name = given.size or ("paper" if given.device == "cuda" else "ci")
    size = SIZES[name]
    sessions = given.sessions or size.sessions
    bench = Bench(size, torch.device(given.device), sessions, given.repeats)
    print(f"{given.device}: copy {bench.bandwidth / 1e9:,.1f} GB/s, matrix product {bench.flops / 1e12:,.3f} TFLOP/s")
    print(f"{sessions:,} next sessions of {size.steps} pages, prompts of {size.median_prompt} tokens (median), greedy")
    print(f"{'':12} {'weights M':>10} {'seconds':>9} {'/s':>9} {'of one':>7} {'prefill MFU':>12} {'decode MBU':>11}")
    rows = bench.table([("one small", size.small, 1), ("3 clusters", size.small, 3), ("6 clusters", size.small, 6),
                        ("one large", size.large, 1)])  # fmt: skip
    for row in rows:
        print(f"{row['job']:12} {row['million_weights']:10,.2f} {row['seconds']:9.3f} {row['sessions_per_s']:9,.0f} "
              f"{row['times_one']:7.3f} {row['prefill_mfu']:12.1%} {row['decode_mbu']:11.1%}"
              + (f"   (paper: {PAPER_S[row['job']]} s)" if name == "paper" else ""))  # fmt: skip
    beside = bench.beside_generate(min(given.generate_sessions or sessions, sessions), given.rollouts)
    for row in beside:
        print(f"{row['job']}: engine {row['engine_s']:.3f} s, generate {row['generate_s']:.3f} s for "
              f"{row['sessions']:,} sessions: {row['times_as_fast']:.2f} times as fast")  # fmt: skip
    print(f"same greedy sessions: {beside[0]['same_sessions']:.1%}")
    result = {"benchmark": "inference", "device": given.device, "size": name, "sessions": sessions,
              "torch": torch.__version__, "python": sys.version.split()[0],
              "copy_gb_s": bench.bandwidth / 1e9, "matmul_tflop_s": bench.flops / 1e12}  # fmt: skip
    print(json.dumps(result | {"table_17": rows, "generate": beside}))


if __name__ == "__main__":
    main()
