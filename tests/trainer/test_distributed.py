"""Two processes learn what one learns, and a killed pair goes on."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer import phases

PAIRS: list[tuple[str, dict[str, Any]]] = [
    ("separate", {}),
    ("token", {"packing": True, "accumulate": 2}),
    ("lora", {"packing": True}),
    ("few rows", {"batch": 59}),  # the second batch has one row, and one process none of it
]


def close(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Whether two logs are the same but for rounding."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], rel=1e-3) for key in a.keys() - {"phase"})
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_after_a_kill(tmp_path: Path) -> None:
    def job(name: str, changes: dict[str, Any], **more: Any) -> dict[str, Any]:
        backend = name if name in ("token", "lora") else "separate"
        return {"directory": str(tmp_path / name), "backend": backend, "world": 2, **changes, **more}

    jobs = [job(name, changes) for name, changes in PAIRS]
    killed = [job(f"killed {rank}", {"kill_at": 5, "kill_rank": rank}) for rank in (0, 1)]
    again = [job(f"killed {rank}", {}) for rank in (0, 1)]
    codes = phases.processes([*jobs, *killed, *again])
    assert codes[: len(jobs)] == [[0, 0]] * len(jobs) and codes[-2:] == [[0, 0]] * 2
    # The one that is left cannot go on alone.
    assert codes[len(jobs) : -2] == [[-signal.SIGKILL, 1], [1, -signal.SIGKILL]]
    for name, changes in PAIRS:
        backend = name if name in ("token", "lora") else "separate"
        phases.train(tmp_path / f"{name} alone", backend, **changes)
        alone, pair = phases.steps(tmp_path / f"{name} alone"), phases.steps(tmp_path / name)
        # Both took part, as a kill of either shows above; whether another order of sums rounds otherwise is chance.
        assert close(alone, pair)
    for rank in (0, 1):
        place = tmp_path / f"killed {rank}"
        assert phases.steps(place) == phases.steps(tmp_path / "separate")
        torch.testing.assert_close(phases.tensors(place), phases.tensors(tmp_path / "separate"), rtol=0, atol=0)
