"""Descent: how the rows lie changes nothing, clusters are learnt, and a killed run ends as an uninterrupted one."""

import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.adapters import Adapters
from tests.trainer import phases
from tests.trainer.phases import CLUSTERS, CPU, SIZE, rows
from trainer.checkpoints import Run
from trainer.descent import descend, groups, schedule
from trainer.errors import TrainingError
from trainer.likelihood import Learner, nats, own_past
from trainer.windows import lay_out, pack


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    made = Run(tmp_path / "run", {}, tmp_path / "steps.jsonl")
    yield made
    made.close()


def gradients(model: Learner, windows: list[np.ndarray], packed: list[list[int]], kinds: Any) -> list[Tensor]:
    """Loss and gradients of the windows in these rows."""
    model.zero_grad()
    chosen = None if kinds is None else kinds[[row[0] for row in packed]]
    loss = nats(model, lay_out(windows, packed), CPU, chosen)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("backend", ["separate", "lora", "token"])
@pytest.mark.parametrize("architecture", ["opt", "qwen2", "llama"])
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(architecture: str, backend: str) -> None:
    windows, clusters = rows(20)
    windows.append(np.concatenate(windows[:3]))  # so long that several others fit into its row
    clusters = np.append(clusters, 0)
    model = phases.learner(backend, architecture=architecture)
    if backend == "token":
        windows = [np.concatenate([[SIZE + k], window]) for k, window in zip(clusters, windows, strict=True)]
    kinds = clusters if backend == "lora" else None
    packed = pack([len(window) - 1 for window in windows], kinds)
    assert len(packed) < 12 and max(len(row) for row in packed) > 2
    alone = [
        gradients(model, [window], [[0]], None if kinds is None else kinds[[i]]) for i, window in enumerate(windows)
    ]
    for together in (packed, [[i] for i in range(len(windows))]):
        for found, *parts in zip(gradients(model, windows, together, kinds), *alone, strict=True):
            torch.testing.assert_close(found, torch.stack(parts).sum(0), rtol=1e-4, atol=1e-4)


def test_no_visitor_sees_another_in_the_same_row() -> None:
    windows, _ = rows(3, seed=5)
    model = phases.model().eval()
    changed = [windows[0], np.where(windows[1] > 3, 4 + (windows[1] + 1) % 8, windows[1]), windows[2]]
    first, last = len(windows[0]) - 1, len(windows[1]) - 1
    found = []
    for given in (windows, changed):
        layout = lay_out(given, [[0, 1, 2]])
        assert layout.segments is not None and layout.positions is not None
        with torch.inference_mode():
            found.append(
                model(
                    input_ids=torch.as_tensor(layout.inputs), position_ids=torch.as_tensor(layout.positions),
                    attention_mask=own_past(torch.as_tensor(layout.segments)), use_cache=False,
                ).logits[0]
            )  # fmt: skip
    one, two = found
    assert torch.equal(one[:first], two[:first]) and torch.equal(one[first + last :], two[first + last :])
    assert not torch.allclose(one[first : first + last], two[first : first + last])


@pytest.mark.parametrize("packing", [False, True])
def test_accumulation_is_one_large_batch(packing: bool, tmp_path: Path) -> None:
    for accumulate in (1, 4):
        phases.train(tmp_path / str(accumulate), batch=16 // accumulate, accumulate=accumulate, packing=packing)
    whole, pieces = (phases.steps(tmp_path / name) for name in ("1", "4"))
    assert len(whole) == len(pieces) == 2 * 4 + 2
    for one, other in zip(whole, pieces, strict=True):
        assert one.keys() == other.keys()
        assert all(pytest.approx(value, rel=1e-3) == other[key] for key, value in one.items() if key != "phase")


def test_packing_is_a_setting_that_leaves_nothing_out(tmp_path: Path) -> None:
    for packing in (False, True):
        phases.train(tmp_path / str(packing), packing=packing)
    apart, packed = (phases.steps(tmp_path / str(packing)) for packing in (False, True))
    tokens = [sum(line.get("tokens", 0) for line in lines) for lines in (apart, packed)]
    expected = sum(int((window != 1).sum()) for window in rows(60)[0])
    assert tokens == [2 * expected, 2 * expected]
    assert apart != packed  # batches of similar length, or of any


@pytest.mark.parametrize("backend", ["separate", "token", "lora"])
def test_a_batch_of_filled_rows_counts_rows(backend: str, tmp_path: Path) -> None:
    windows, _ = rows(60)
    tokens, labels = (sum(len(w) - 1 for w in windows), sum(int((w != 1).sum()) for w in windows))
    phases.train(tmp_path, backend, fill=64, batch=2, accumulate=2)
    told = [line for line in phases.steps(tmp_path) if "loss" in line]
    assert len(told) == 2 * -(-tokens // (64 * 4)), "steps of two epochs"
    assert sum(line["tokens"] for line in told) == 2 * labels
    # An epoch has one step that is not full; of the others no window is left out but what [BOS] takes.
    assert sum(line["tokens"] < 0.7 * 4 * 64 for line in told) <= 2


def test_filled_rows_are_another_order_of_the_same_windows(tmp_path: Path) -> None:
    """All windows in one batch: however they lie in rows, the first step is the same."""
    phases.train(tmp_path / "filled", batch=99, fill=64)
    phases.train(tmp_path / "apart", batch=99, packing=False)
    filled, apart = (phases.steps(tmp_path / name)[0] for name in ("filled", "apart"))
    assert filled["tokens"] == apart["tokens"]
    assert (filled["loss"], filled["grad_norm"]) == pytest.approx((apart["loss"], apart["grad_norm"]), rel=1e-3)


@pytest.mark.parametrize("backend", ["token", "lora"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_cluster_is_learnt(backend: str, packing: bool, run: Run) -> None:
    windows, clusters = rows(80)
    model = phases.learner(backend, spread=1.0)
    falling = iter(range(20, 0, -1))
    changes: dict[str, Any] = {"rows": windows, "posterior": np.eye(CLUSTERS)[clusters], "epochs": 12}
    descend(model, phases.phase(**changes, packing=packing, judge=lambda _: next(falling)), run, CPU)
    firsts = []
    for k in range(CLUSTERS):  # the first page of a visitor says nothing but the cluster
        layout = lay_out([np.array([SIZE + k, 1, 4])[backend == "lora" :]], [[0]])
        inputs = torch.as_tensor(layout.inputs)
        with torch.inference_mode():
            if isinstance(model, Adapters):
                logits = model(k, input_ids=inputs).logits
            else:
                logits = model(input_ids=inputs).logits
        firsts.append(torch.softmax(logits[0, -1], -1)[4 : 4 + 8].reshape(2, 4).sum(1))
    assert firsts[0][0] > 0.9 and firsts[1][1] > 0.9


def test_a_frozen_trunk_stays(run: Run) -> None:
    model = phases.learner("lora")
    assert isinstance(model, Adapters)
    before = {name: value.clone() for name, value in model.plain().named_parameters()}
    model.freeze()
    descend(model, phases.phase(posterior=phases.spread()), run, CPU)
    after = dict(model.plain().named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(model.merge(0).get_parameter(name := "model.decoder.layers.0.fc1.weight"), after[name])


def test_clusters_are_drawn_anew_each_epoch_and_each_row_meets_both(run: Run) -> None:
    from trainer.descent import _Descent

    descent = _Descent(phases.learner("token"), phases.phase(posterior=phases.spread()), run, CPU, None)
    drawn = np.stack([found for epoch in range(200) if (found := descent.clusters(epoch)) is not None])
    assert set(np.unique(drawn)) == {SIZE, SIZE + 1}
    shares = (drawn == SIZE).mean(axis=0)
    assert np.abs(shares - phases.spread()[:, 0]).max() < 0.12  # four standard errors
    again = descent.clusters(3)
    assert again is not None and np.array_equal(drawn[3], again)


RUNS: list[dict[str, Any]] = [
    {"backend": "separate"},
    {"backend": "token", "packing": True, "dropout": 0.1},
    {"backend": "lora", "packing": True, "accumulate": 2, "batch": 4},
    {"backend": "lora", "fill": 40, "batch": 2},
]


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    places = [tmp_path / str(i) for i in range(len(RUNS))]
    jobs = [{"directory": str(place), "kill_at": 5, **changes} for place, changes in zip(places, RUNS, strict=True)]
    assert phases.processes(jobs) == [[-signal.SIGKILL]] * len(jobs)
    for place, changes in zip(places, RUNS, strict=True):
        whole = tmp_path / f"{place.name} whole"
        assert len(phases.steps(place)) == 5  # two of them after the last checkpoint, and no epoch judged
        assert phases.train(place, **changes) == phases.train(whole, **changes)
        assert phases.steps(place) == phases.steps(whole)
        torch.testing.assert_close(phases.tensors(place), phases.tensors(whole), rtol=0, atol=0)


def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    first = phases.train(tmp_path)
    before = phases.steps(tmp_path)
    assert phases.train(tmp_path) == pytest.approx(first)
    assert phases.steps(tmp_path) == before


def test_it_stops_early_and_keeps_the_best_epoch(run: Run) -> None:
    losses = iter([3.0, 2.0, 2.5, 2.2, 1.0])
    kept: list[dict[str, Tensor]] = []

    def judge(model: Any) -> float:
        kept.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return next(losses)

    model = phases.learner("separate")
    best = descend(model, phases.phase(judge=judge, epochs=9, patience=2), run, CPU)
    assert best == 2.0 and len(kept) == 4
    assert all(torch.equal(value, kept[1][name]) for name, value in model.named_parameters())


def test_the_start_may_win(run: Run) -> None:
    model = phases.learner("separate")
    before = [value.clone() for value in model.parameters()]
    losses = iter([1.0, 2.0, 3.0])
    descend(model, phases.phase(judge=lambda _: next(losses), keep_start=True), run, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_after_the_deadline_no_step_begins(tmp_path: Path) -> None:
    phases.train(tmp_path, deadline=time.monotonic())
    assert phases.steps(tmp_path) == []


def test_a_loss_that_is_no_number_ends_it_with_the_step(run: Run) -> None:
    model = phases.learner("separate")
    with torch.no_grad():
        model.get_parameter("model.decoder.embed_tokens.weight")[5] = torch.nan
    with pytest.raises(
        TrainingError, match=r"phase pretrain, step 0: the loss is nan.*Lower the learning rate \(0.01\)"
    ):
        descend(model, phases.phase(), run, CPU)


def test_biases_and_norms_do_not_decay() -> None:
    model = phases.model()
    decayed, kept = groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(value): name for name, value in model.named_parameters()}
    assert all(names[id(value)].endswith("bias") or "norm" in names[id(value)] for value in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_the_rate_warms_up_and_falls_to_a_twentieth() -> None:
    rates = [schedule(step, 200) for step in range(200)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0 and all(a >= b for a, b in pairwise(rates[10:]))
    assert rates[-1] == pytest.approx(0.05, abs=1e-3) and rates[105] == pytest.approx(0.525)
    assert [schedule(step, 200, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(0, 3, 10) == pytest.approx(1 / 3)  # a phase of fewer steps


def test_progress_hears_of_every_step_and_its_speed(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []

    class Bar:
        def add_task(self, name: str, **fields: Any) -> int:
            assert (name, fields) == ("pretrain", {"total": 16, "completed": 0, "tokens_per_s": None})
            return 3

        def update(self, task: int, **fields: Any) -> None:
            assert task == 3
            heard.append(fields)

    phases.train(tmp_path, progress=Bar())
    assert [fields.get("advance") for fields in heard] == [1] * 16 + [None]
    assert all(fields["tokens_per_s"] > 0 for fields in heard[:-1]) and heard[-1] == {"completed": 16}


def test_steps_of_a_training_with_other_options_are_not_thrown_away(tmp_path: Path) -> None:
    place, log = tmp_path / "run", tmp_path / "steps.jsonl"
    Run(place, {"seed": 0, "lr": 1e-3, "sessions": "a"}, log).close()
    Run(place, {"seed": 1, "lr": 1e-3, "sessions": "a"}, log).close()  # nothing was learnt yet
    run = Run(place, {"seed": 0, "lr": 1e-3, "sessions": "a"}, log)
    run.log({"step": 0})
    run.finish("pretrain", {"x": torch.zeros(1)})
    run.close()
    with pytest.raises(TrainingError, match=r"begun otherwise \(lr 0.001, other sessions\). Give what"):
        Run(place, {"seed": 0, "lr": 2e-3, "sessions": "b"}, log)
    assert Run(place, {"seed": 0, "lr": 1e-3, "sessions": "a"}, log).finished("pretrain") is not None


def test_only_the_first_process_looks_at_what_it_may_clear_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path / "run", {}, tmp_path / "steps.jsonl").close()
    monkeypatch.setattr("trainer.ranks.rank", lambda: 1)
    monkeypatch.setattr("trainer.ranks.from_first", lambda value: not value)  # the first one found its run
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} may be gone"))
    assert Run(tmp_path / "run", {}, tmp_path / "steps.jsonl").resumed
