"""HeTLM's Algorithm 1 step by step against its plain form, its settings, its memory of a kill, and what it exports."""

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from models.language_model import LanguageModel, build
from models.selector import Embed, PageMeans, SelectorNet, make_embed
from models.vocabulary import BOS, EOS, UNK, Tokenizer, Vocabulary
from tests.trainer.conftest import TOPICS, shop, write
from trainer.actor_critic import ActorCritic
from trainer.checkpoints import Run
from trainer.clusters import router_of
from trainer.corpus import Corpus, read_corpus
from trainer.curves import draw
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.losses import hard_centroids
from trainer.paper import PaperFit, PaperOptions, fit_paper, imitate, prune
from trainer.samples import Samples

CPU = torch.device("cpu")
PAGES = ["home", *TOPICS["shoes"], *TOPICS["music"], "basket", "thank you"]
VOCABULARY = Vocabulary(PAGES, [0.1] * len(PAGES), 100)
TOKENIZER = Tokenizer(VOCABULARY)
WIDTH, CLUSTERS, CONTEXT = 8, 3, 48
TABLE = np.random.default_rng(5).normal(size=(len(VOCABULARY), WIDTH)).astype(np.float32)
FAST = PaperOptions(epochs=2, batch=16, selector_lr=1e-3, predictor_lr=2e-3)


def visits(corpus: Corpus) -> list[Example]:
    return examples(corpus, corpus.returning(), router_of(VOCABULARY, np.zeros((len(VOCABULARY), 1))))


@dataclass(frozen=True)
class Data:
    """Returning visitors of the tests' shop, for training and for validation."""

    train: list[Example]
    held: list[Example]
    embed: Embed

    def samples(self, part: list[Example]) -> Samples:
        return Samples.of(part, torch.tensor(self.embed([e.visit for e in part])), TOKENIZER, CONTEXT)


@pytest.fixture(scope="module")
def data(sessions: Path) -> Data:
    found = visits(read_corpus(sessions))
    return Data(found[:64], found[64:], PageMeans(TABLE, TOKENIZER))


def language_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build("opt", len(VOCABULARY), 16, 1, 2, CONTEXT + 8)


Make = Callable[..., ActorCritic]


@pytest.fixture
def training(data: Data, tmp_path: Path) -> Iterator[Make]:
    """A selector over different predictors, before the first step."""
    stores: list[Run] = []

    def make(options: PaperOptions = FAST, train: list[Example] = data.train, scale: float = 1.0) -> ActorCritic:
        samples = data.samples(train)
        samples = replace(samples, z=scale * samples.z)
        torch.manual_seed(1)
        selector = SelectorNet(WIDTH, CLUSTERS, dropout=0.0)
        models = [language_model(seed) for seed in range(CLUSTERS)]
        centroids = hard_centroids(samples.z, torch.arange(len(samples.z)) % CLUSTERS, torch.zeros(CLUSTERS, WIDTH))
        place = tmp_path / str(len(stores))
        place.mkdir()
        stores.append(Run(place / "run", {}, place / "log"))
        held = data.samples(data.held)
        return ActorCritic(selector, models, centroids, samples, held, options, stores[-1], CPU, 0, checkpoint_steps=3)

    yield make
    for store in stores:
        store.close()


def lines(path: Path) -> list[dict[str, Any]]:
    """A step log without what a clock says."""
    told = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("time", "tokens_per_s")} for line in told]


def one_step(training: ActorCritic, rows: list[int]) -> dict[str, Any]:
    training.step(rows, 0)
    return lines(training.store.log_path)[-1]


def fitted(
    data: Data, place: Path, options: PaperOptions = FAST, progress: Any = None, seed: int = 0, clusters: int = CLUSTERS
) -> PaperFit:
    store = Run(place / "run", {}, place / "log")
    try:
        return fit_paper(
            language_model(), data.train, data.held, data.embed, TOKENIZER, clusters, options, store, CPU, CONTEXT,
            seed, progress, checkpoint_steps=3,
        )  # fmt: skip
    finally:
        store.close()


# What the selector may see


def with_other_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same visitors, each with another last session."""
    last = {row["user_id"]: row["session_id"] for row in rows}
    other = ["thank you", "drums", "drums", "boots"]
    return [row | {"pages": other} if last[row["user_id"]] == row["session_id"] else row for row in rows]


@pytest.mark.parametrize("embedding", ["pages", "text"])
def test_the_target_session_never_reaches_the_embedding(embedding: Any, tmp_path: Path) -> None:
    rows = shop(12)
    before = visits(read_corpus(write(rows, tmp_path / "a")))
    after = visits(read_corpus(write(with_other_targets(rows), tmp_path / "b")))
    assert all(a.target != b.target for a, b in zip(before, after, strict=True))
    embed = make_embed(embedding, TABLE, TOKENIZER)
    z = embed([example.visit for example in before])
    assert z.shape == (len(before), WIDTH if embedding == "pages" else 384) and len(np.unique(z, axis=0)) > 3
    np.testing.assert_array_equal(z, embed([example.visit for example in after]))


def test_the_target_reaches_the_selector_only_as_a_loss(training: Make, data: Data) -> None:
    rows = list(range(16))
    other = [replace(example, target=["drums", "boots"]) for example in data.train]
    first = one_step(training(), rows)
    second = one_step(training(train=other), rows)
    for name in ("sizes", "l2", "l3", "slope2", "slope3"):
        assert first[name] == second[name]
    assert first["l1"] != second["l1"] and first["slope1"] != second["slope1"]


def test_samples_keep_the_target_whole_and_the_newest_pages_before_it(data: Data) -> None:
    long = replace(data.train[0], target=["boots", "nowhere", "drums"])
    long = replace(long, visit=replace_sessions(long, [["home"] * 9, ["boots", "sandals"]]))
    (found,) = (Samples.of([long], torch.zeros(1, WIDTH), TOKENIZER, context) for context in (15,))
    home, boots, sandals, drums = TOKENIZER.encode(["home", "boots", "sandals", "drums"])
    assert found.prompts == [[BOS, *[home] * 4, EOS, BOS, boots, sandals, EOS, BOS]]
    assert found.targets == [[boots, UNK, drums]]
    short = Samples.of([long], torch.zeros(1, WIDTH), TOKENIZER, 4)
    assert (short.prompts, short.targets) == ([[BOS]], [[boots, UNK]])
    two = Samples(torch.zeros(2, WIDTH), [*found.prompts, [BOS]], [*found.targets, [home]])
    tokens, target = two.batch([0, 1], "target", CPU)
    assert tokens[0].tolist() == [*found.prompts[0], boots, UNK, drums, EOS]
    labels = tokens[:, 1:]
    assert [row[mask].tolist() for row, mask in zip(labels, target, strict=True)] == [
        [boots, UNK, drums, EOS], [home, EOS],
    ]  # fmt: skip
    _, every = two.batch([0, 1], "all", CPU)
    assert [row[mask].tolist() for row, mask in zip(labels, every, strict=True)] == [
        [*[home] * 4, EOS, boots, sandals, EOS, boots, UNK, drums, EOS], [home, EOS],
    ]  # fmt: skip


def replace_sessions(example: Example, sessions: list[list[str]]) -> Any:
    return type(example.visit)(example.visit.seed, sessions, None)


# One step


def plain_losses(training: ActorCritic, rows: list[int]) -> np.ndarray:
    """Mean nats per target token of every predictor on every sample, as the engine scores them: (B, K)."""
    samples = training.train
    prompts, targets = [samples.prompts[row] for row in rows], [samples.targets[row] for row in rows]
    counts = np.array([len(target) + 1 for target in targets])
    return np.stack([LanguageModel(model).nll(prompts, targets) / counts for model in training.predictors], axis=1)


def test_a_step_is_that_of_algorithm_1(training: Make) -> None:
    options = replace(FAST, alpha=0.7, beta=2.0, clip=float("inf"))
    one, rows = training(options), list(range(3, 19))
    z, memory, tau = one.train.z[rows], one.memory.clone(), one.tau
    losses = torch.tensor(plain_losses(one, rows), dtype=torch.float32)
    selector, models = copy.deepcopy(one.selector), copy.deepcopy(one.predictors)
    line = one_step(one, rows)

    pi = selector(z).softmax(1)
    chosen = pi.argmax(1)
    l1 = (pi * losses).sum(1).mean()
    l2 = -(pi * pi.log()).sum(1).mean()
    e = 0.9 * memory + 0.1 * (pi.T @ z) / pi.sum(0)[:, None]
    distances = torch.stack([(e[k] - e[m]).abs().sum() for k in range(CLUSTERS) for m in range(k)])
    assert tau is not None
    l3 = torch.sigmoid(-distances.mean() / tau)
    objective = l1 + 0.7 * l2 + 2.0 * l3
    for name, value in (("l1", l1), ("l2", l2), ("l3", l3), ("objective", objective)):
        assert line[name] == pytest.approx(value.item(), rel=1e-5)
    assert line["sizes"] == torch.bincount(chosen, minlength=CLUSTERS).tolist()
    own = losses[torch.arange(len(rows)), chosen]
    assert line["critic"] == [
        pytest.approx(float(own[chosen == k].mean()), rel=1e-5) if (chosen == k).any() else None
        for k in range(CLUSTERS)
    ]
    counts = torch.tensor([len(one.train.targets[row]) + 1 for row in rows])
    assert line["loss"] == pytest.approx(float((own * counts).sum() / counts.sum()), rel=1e-5)

    adam = torch.optim.AdamW(selector.parameters(), lr=options.selector_lr, weight_decay=options.selector_weight_decay)
    objective.backward()
    adam.step()
    same(selector, one.selector)
    for k, model in enumerate(models):
        if (chosen == k).any():
            adam = torch.optim.AdamW(model.parameters(), lr=options.predictor_lr, weight_decay=0.01)
            some = [rows[i] for i in range(len(rows)) if chosen[i] == k]
            tokens, scored = one.train.batch(some, "target", CPU)
            logits = model(input_ids=tokens[:, :-1]).logits.log_softmax(-1)
            nll = -logits.gather(2, tokens[:, 1:, None]).squeeze(2) * scored
            (nll.sum(1) / scored.sum(1)).mean().backward()
            adam.step()
        same(model, one.predictors[k])


def same(expected: torch.nn.Module, found: torch.nn.Module) -> None:
    for (name, a), (_, b) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6, msg=name)


def moved(before: torch.nn.Module, after: torch.nn.Module) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def steer(training: ActorCritic, cluster: int) -> None:
    """Let the selector choose `cluster` for everybody."""
    with torch.no_grad():
        training.selector.output.bias.copy_(4.0 * torch.eye(CLUSTERS)[cluster])  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("critic", ["hard", "soft"])
def test_a_predictor_that_nobody_chose_is_left_alone_unless_the_critic_is_soft(critic: Any, training: Make) -> None:
    one = training(replace(FAST, critic=critic))
    for cluster in (0, 1):  # it stays alone also when it has an optimiser state
        steer(one, cluster)
        before = copy.deepcopy(one.predictors)
        line = one_step(one, list(range(16)))
        assert line["sizes"][cluster] == 16
        expected = [k == cluster or critic == "soft" for k in range(CLUSTERS)]
        assert [moved(a, b) for a, b in zip(before, one.predictors, strict=True)] == expected
        assert [value is not None for value in line["critic"]] == expected
    if critic == "soft":
        assert sum(line["critic"]) == pytest.approx(line["l1"], rel=1e-5)


@pytest.mark.parametrize("loss_on", ["target", "all"])
def test_a_sum_is_the_mean_times_the_tokens(loss_on: Any, training: Make) -> None:
    found = {}
    for reduction in ("mean", "sum"):
        one = training(replace(FAST, reduction=reduction, loss_on=loss_on))
        found[reduction] = one_step(one, [7])
        tokens = [*one.train.prompts[7], *one.train.targets[7], EOS]
        count = len(one.train.targets[7]) + 1 if loss_on == "target" else len(tokens) - tokens.count(BOS)
    assert found["sum"]["l1"] == pytest.approx(count * found["mean"]["l1"], rel=1e-5)
    assert found["sum"]["loss"] == pytest.approx(found["mean"]["loss"], rel=1e-5)


def test_l3_moves_the_selector_only_scaled_and_through_soft_centroids(training: Make) -> None:
    slopes = {}
    for l3 in ("paper", "scaled"):
        for dictionary in ("soft", "hard"):
            # Distances as those of K-means centroids in 384 dimensions.
            one = training(replace(FAST, l3=l3, dictionary=dictionary, memory=0.0), scale=50.0)
            with torch.no_grad():
                one.selector.output.weight.mul_(0.5)  # type: ignore[operator, union-attr]
            line = one_step(one, list(range(16)))
            slopes[l3, dictionary] = line["slope3"]
            assert line["l3"] < 1e-6 if l3 == "paper" else 0.001 < line["l3"] < 0.5
    assert slopes["paper", "soft"] <= 1e-12 and slopes["paper", "hard"] == slopes["scaled", "hard"] == 0.0
    assert slopes["scaled", "soft"] > 1e-5


def test_soft_centroids_remember(training: Make) -> None:
    kept, rows = {}, list(range(16))
    for memory in (0.0, 0.75):
        one = training(replace(FAST, memory=memory))
        start = one.memory.clone()
        one.step(rows, 0)
        kept[memory] = one.memory
    torch.testing.assert_close(kept[0.75], 0.75 * start + 0.25 * kept[0.0])


# A whole run


@pytest.fixture(scope="module")
def whole(data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[PaperFit, Path]:
    """One run without interruption, and its log."""
    place = tmp_path_factory.mktemp("whole")
    return fitted(data, place), place / "log"


def test_the_clusters_that_are_left_are_ordered_and_consistent(whole: tuple[PaperFit, Path], data: Data) -> None:
    fit, _ = whole
    assert fit.users == sorted(fit.users, reverse=True) and sum(fit.users) == len(data.train) and min(fit.users) > 0
    assert len(fit.models) == len(fit.users) == len(fit.centroids) == fit.selector.clusters
    assert np.bincount(fit.clusters).tolist() == fit.users
    z = data.embed([example.visit for example in data.train])
    assert fit.selector.eval()(torch.tensor(z)).argmax(1).tolist() == fit.clusters.tolist()
    for k in range(len(fit.users)):
        np.testing.assert_allclose(fit.centroids[k], z[fit.clusters == k].mean(0), rtol=1e-4, atol=1e-6)
    assert len(fit.history) == 1 + FAST.epochs and all(sum(sizes) == len(data.train) for sizes in fit.history)
    assert any(sorted(filter(None, sizes), reverse=True) == fit.users for sizes in fit.history[1:])


def test_the_best_epoch_is_kept(whole: tuple[PaperFit, Path], data: Data) -> None:
    fit, log = whole
    told = [line["validation_loss"] for line in lines(log) if "validation_loss" in line]
    held = data.samples(data.held)
    with torch.no_grad():
        chosen = fit.selector.eval()(held.z).argmax(1).tolist()
    nats = [
        float(LanguageModel(fit.models[k]).nll([prompt], [target])[0])
        for k, prompt, target in zip(chosen, held.prompts, held.targets, strict=True)
    ]
    tokens = sum(len(target) + 1 for target in held.targets)
    assert len(told) == FAST.epochs and sum(nats) / tokens == pytest.approx(min(told), rel=1e-5)


def test_the_log_tells_every_step(whole: tuple[PaperFit, Path], tmp_path: Path) -> None:
    steps = [line for line in lines(whole[1]) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(FAST.epochs * 4))  # 64 users in batches of 16
    for line in steps:
        assert line["objective"] == pytest.approx(line["l1"] + FAST.alpha * line["l2"] + FAST.beta * line["l3"])
        assert line["tokens"] > 16
        assert sum(line["sizes"]) == 16 and all(line[f"slope{i}"] >= 0 for i in (1, 2, 3))
        assert [size > 0 for size in line["sizes"]] == [loss is not None for loss in line["critic"]]
    draw(whole[1], tmp_path / "curves.svg")
    assert "actor-critic" in (tmp_path / "curves.svg").read_text()


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    whole: tuple[PaperFit, Path], data: Data, tmp_path: Path
) -> None:
    fit, log = whole
    again = fitted(data, tmp_path / "again")
    assert lines(tmp_path / "again" / "log") == lines(log)
    assert not any(moved(a, b) for a, b in zip(fit.models, again.models, strict=True))
    fitted(data, tmp_path / "other", seed=1)
    assert lines(tmp_path / "other" / "log") != lines(log)


class Killer:
    """Progress that ends the process with SIGKILL after some steps."""

    def __init__(self, left: int) -> None:
        self.left = left

    def add_task(self, *_: Any, **__: Any) -> int:
        return 0

    def update(self, *_: Any, **__: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_again_and_again_it_ends_with_the_same_numbers(
    whole: tuple[PaperFit, Path], data: Data, tmp_path: Path
) -> None:
    fit, log = whole
    # An epoch has 4 steps, and there are checkpoints after 3, 4 and 6. A killed run's log ends with its last step.
    for left, reached in ((2, 2), (4, 4), (3, 6), (3, 7)):
        child = os.fork()
        if child == 0:
            fitted(data, tmp_path, progress=Killer(left))
            os._exit(3)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert sum("loss" in line for line in lines(tmp_path / "log")) == reached
    calls: list[int] = []

    def embed(visits: Any) -> np.ndarray:
        calls.append(len(visits))
        return data.embed(visits)

    last = fitted(replace(data, embed=embed), tmp_path)
    assert not calls  # the encoder ran once, before the kill
    assert lines(tmp_path / "log") == lines(log)
    assert last.history == fit.history and last.users == fit.users
    assert not any(moved(a, b) for a, b in zip(fit.models, last.models, strict=True))
    assert not moved(fit.selector, last.selector)


def test_progress_hears_of_every_step_and_its_speed(training: Make) -> None:
    heard: list[dict[str, Any]] = []

    class Bar:
        def add_task(self, name: str, **fields: Any) -> int:
            assert (name, fields) == ("actor-critic", {"total": 8, "completed": 0, "tokens_per_s": None})
            return 3

        def update(self, task: int, **fields: Any) -> None:
            heard.append(fields)

    training().run(Bar())
    assert [fields["advance"] for fields in heard] == [1] * 8 and all(fields["tokens_per_s"] > 0 for fields in heard)


def test_a_selector_that_knows_its_clusters_stays_with_them(data: Data, tmp_path: Path) -> None:
    """Findings, section 1: started at K-means and taught well, Algorithm 1 keeps the K-means clusters."""
    topics = np.zeros_like(TABLE)
    for column, pages in enumerate(TOPICS.values()):
        topics[TOKENIZER.encode(pages), column] = 3.0
    told = replace(data, embed=PageMeans(topics, TOKENIZER))
    fit = fitted(told, tmp_path, replace(FAST, selector_epochs=60, epochs=4), clusters=len(TOPICS))
    assert all(sizes == fit.history[0] for sizes in fit.history) and len(fit.users) == 2
    likes_music = [bool(set(TOPICS["music"]) & set(example.visit.sessions[0])) for example in data.train]
    assert fit.clusters.tolist() == [int(music) for music in likes_music]  # two of three visitors like shoes


def test_a_cluster_that_nobody_chooses_is_dropped(data: Data, tmp_path: Path) -> None:
    """Findings, section 1: a selector that is sharpened before it has learnt anything gives clusters up."""
    hasty = replace(FAST, selector_epochs=0, selector_lr=0.1, alpha=9.0, epochs=2)
    fit = fitted(data, tmp_path, hasty)
    assert len(fit.models) == len(fit.users) == fit.selector.clusters < CLUSTERS
    assert 0 in fit.history[-1]


def test_a_pruned_selector_keeps_the_odds() -> None:
    torch.manual_seed(0)
    selector, z = SelectorNet(WIDTH, 4).eval(), torch.randn(5, WIDTH)
    full, pruned = selector(z), prune(selector, [3, 1]).eval()(z)
    torch.testing.assert_close(pruned, full[:, [3, 1]])


def test_imitation_learns_the_labels() -> None:
    torch.manual_seed(0)
    z = torch.randn(300, WIDTH)
    labels = (z[:, 0] > 0).long()
    selector = SelectorNet(WIDTH, 2)

    def agreement() -> float:
        chosen: Tensor = selector.eval()(z).argmax(1)
        return float((chosen == labels).float().mean())

    imitate(selector, z, labels, 0)
    before = agreement()
    imitate(selector, z, labels, 40)
    assert before < 0.8 < 0.95 < agreement()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "paper.epochs is 0, but must be at least 1"),
        ({"alpha": -1.0}, "paper.alpha is -1.0"),
        ({"selector_lr": 2.0}, "paper.selector_lr is 2.0, but must lie between"),
        ({"memory": 1.0}, "paper.memory is 1.0"),
        ({"clip": 0.0}, "paper.clip is 0.0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        PaperOptions(**changes)


def test_the_numbers_are_those_of_table_15() -> None:
    options = PaperOptions()
    assert (options.batch, options.epochs) == (16, 10)
    assert (options.selector_lr, options.selector_weight_decay) == (5e-5, 1e-4)
    assert (options.predictor_lr, options.predictor_weight_decay) == (1e-5, 0.01)
    assert 0.5 <= options.alpha <= 5 and 1 <= options.beta <= 9


def test_a_loss_that_is_no_number_ends_the_run(training: Make) -> None:
    one = training()
    with torch.no_grad():
        next(one.predictors[0].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match="no finite number"):
        one.step(list(range(16)), 0)


def test_no_step_begins_after_the_deadline(training: Make) -> None:
    one = training()
    one.run(deadline=0.0)
    assert not lines(one.store.log_path) and one.sizes
