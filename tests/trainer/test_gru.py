"""The GRU baseline against plain loops, token by token."""

import numpy as np
import pytest
import torch

from models.sampling import uniforms
from models.vocabulary import BOS, EOS, PAD, UNK
from trainer.gru import GRU4Rec, GRUPredictor, Schedule, fit_gru, next_page_loss

SIZE, WIDTH = 9, 6
CPU = torch.device("cpu")
PROMPTS = [[BOS, 4, 5, 6, EOS, BOS], [BOS, 7, EOS, BOS], [BOS]]


def network(seed: int = 0) -> GRU4Rec:
    torch.manual_seed(seed)
    model = GRU4Rec(SIZE, WIDTH).eval()
    torch.nn.init.normal_(model.bias)
    return model


def chances(model: GRU4Rec, tokens: list[int]) -> np.ndarray:
    """P(next token) after the tokens, by the equations of the GRU (Cho et al. 2014, with PyTorch's reset gate)."""
    p = {name: value.detach().double().numpy() for name, value in model.named_parameters()}
    h = np.zeros(2 * WIDTH)
    for token in tokens:
        x = p["gru.weight_ih_l0"] @ p["embedding.weight"][token] + p["gru.bias_ih_l0"]
        y = p["gru.weight_hh_l0"] @ h + p["gru.bias_hh_l0"]
        (xr, xz, xn), (yr, yz, yn) = np.split(x, 3), np.split(y, 3)
        r, z = 1 / (1 + np.exp(-xr - yr)), 1 / (1 + np.exp(-xz - yz))
        h = (1 - z) * np.tanh(xn + r * yn) + z * h
    logits = p["embedding.weight"] @ (p["output.weight"] @ h + p["output.bias"]) + p["bias"]
    p_next: np.ndarray = np.exp(logits - np.logaddexp.reduce(logits))
    return p_next


def allowed(p: np.ndarray, first: bool) -> np.ndarray:
    p = p.copy()
    p[[PAD, BOS, UNK] + [EOS] * first] = 0.0
    normalised: np.ndarray = p / p.sum()
    return normalised


def test_nll_is_that_of_the_equations() -> None:
    model, targets = network(), [[4, 4, 8], [5], [UNK, 6]]
    found = GRUPredictor(model, CPU).nll(PROMPTS, None, targets)
    for row, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True)):
        whole = [*prompt, *target, EOS]
        slow = -sum(np.log(chances(model, whole[:i])[whole[i]]) for i in range(len(prompt), len(whole)))
        assert found[row] == pytest.approx(slow, rel=1e-5)


def test_greedy_and_rollouts_are_those_of_a_plain_loop() -> None:
    model, steps = network(1), 6
    groups = np.zeros((2, SIZE), dtype=np.float32)
    groups[0, 4], groups[1, 5:7] = 1.0, 1.0
    draws = uniforms(["a", "b", "c"], 5, steps)
    rolled = GRUPredictor(model, CPU).rollouts(PROMPTS, None, draws, groups)
    for row, prompt in enumerate(PROMPTS):
        path: list[int] = []
        while len(path) < steps:
            best = int(allowed(chances(model, prompt + path), not path).argmax())
            if best == EOS:
                break
            path.append(best)
        assert rolled.paths[row] == path
        marginals, hits = np.zeros(SIZE), np.zeros(2)
        for column, uniform in enumerate(draws[row]):
            session: list[int] = []
            for u in uniform:
                p = allowed(chances(model, prompt + session), not session)
                marginals += p * ~np.isin(np.arange(SIZE), session) / 5
                hits += (groups @ p) * ~groups[:, session].any(axis=1) / 5
                token = int(np.searchsorted(p.cumsum(), u, side="right"))
                session.append(token)
                if token == EOS:
                    break
            padded = session + [EOS] * (steps - len(session))
            assert rolled.sequences[row, column].tolist() == padded
        marginals[: UNK + 1] = 0.0
        np.testing.assert_allclose(rolled.marginals[row], marginals.clip(0, 1), atol=1e-5)
        np.testing.assert_allclose(rolled.groups[row], hits.clip(0, 1), atol=1e-5)


def test_the_loss_leaves_out_padding_and_the_sure_token() -> None:
    model = network()
    tokens = torch.tensor([[BOS, 4, EOS, BOS, 5, EOS], [BOS, 6, EOS, PAD, PAD, PAD]])
    scored = [[BOS, 4, EOS, BOS, 5, EOS][:i] for i in (2, 3, 5, 6)] + [[BOS, 6, EOS][:i] for i in (2, 3)]
    slow = np.mean([-np.log(chances(model, prefix[:-1])[prefix[-1]]) for prefix in scored])
    assert next_page_loss(model, tokens).item() == pytest.approx(slow, rel=1e-5)


def test_it_learns_what_follows_what_and_keeps_the_best_epoch() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(96):
        first = int(rng.integers(4, 6))  # a visitor of 4 goes on to 6, one of 5 to 7: only the history tells
        rows.append(np.array([BOS, first, EOS, BOS, first + 2, EOS]))
    plan = Schedule(epochs=12, batch=16, lr=0.05, weight_decay=0.0, patience=12, seed=3)
    prompts, targets = [[BOS, 4, EOS, BOS], [BOS, 5, EOS, BOS]], [[6], [7]]
    losses: list[float] = []

    def judge(predictor: GRUPredictor) -> float:
        losses.append(float(predictor.nll(prompts, None, targets).mean()))
        return losses[-1]

    predictor = fit_gru(rows, SIZE, 8, plan, judge, CPU)
    assert predictor.greedy(prompts, None, 4) == targets
    assert predictor.nll(prompts, None, targets).mean() == pytest.approx(min(losses)) and min(losses) < 0.1
    again = fit_gru(rows, SIZE, 8, plan, judge, CPU)
    assert again.nll(prompts, None, targets).tolist() == predictor.nll(prompts, None, targets).tolist()


def test_training_ends_when_validation_no_longer_improves() -> None:
    rows = [np.array([BOS, 4, EOS])] * 8
    judged = []

    def judge(predictor: GRUPredictor) -> float:
        judged.append(predictor)
        return float(len(judged))

    fit_gru(rows, SIZE, 4, Schedule(20, 8, 0.01, 0.0, patience=3, seed=0), judge, CPU)
    assert len(judged) == 4
