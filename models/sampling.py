"""Counter-based random numbers: a rollout's draws depend on the visit, the rollout and the step, on nothing else."""

import hashlib
from collections.abc import Sequence

import numpy as np


def uniforms(seeds: Sequence[str], rollouts: int, steps: int) -> np.ndarray:
    """Uniform draws in [0, 1) for each visit, rollout and step: (B, R, S) float32, multiples of 2**-24.

    SplitMix64 (Steele, Lea, Flood 2014) at counter rollout * 2**16 + step, started at a digest of the visit's seed.
    """
    starts = [int.from_bytes(hashlib.blake2b(seed.encode(errors="replace"), digest_size=8).digest()) for seed in seeds]
    counters = np.arange(rollouts, dtype=np.uint64)[:, None] * np.uint64(1 << 16) + np.arange(steps, dtype=np.uint64)
    golden = np.uint64(0x9E3779B97F4A7C15)
    x: np.ndarray = np.array(starts, dtype=np.uint64)[:, None, None] + (counters + np.uint64(1)) * golden
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    draws: np.ndarray = (x >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return draws
