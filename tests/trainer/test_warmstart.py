"""Going on from a bundle: old pages keep their rows, new pages get rows, clusters stay who they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.bundle import load_bundle
from models.language_model import LanguageModel, build
from models.manifest import BundleRefused
from models.specials import SPECIALS
from models.visit import Visit
from models.vocabulary import Vocabulary
from tests.trainer.conftest import MODES, shop, write
from trainer.corpus import read_corpus
from trainer.fit import TrainOptions, train
from trainer.mixture import MixtureOptions, fit_chains, refit_chains
from trainer.warmstart import Start, grow, obstacle

Options = Callable[..., TrainOptions]
NEW = {"shoes": "slippers", "guitar": "banjo"}


def renewed(users: int, seed: int) -> list[dict[str, Any]]:
    """The shop's sessions after two pages were taken off the shelves and two came instead."""
    rows = shop(users, seed)
    for row in rows:
        row["pages"] = [NEW.get(page, page) for page in row["pages"]]
    return rows


@pytest.fixture(scope="module", params=[mode for mode in MODES if mode != "paper"])
def mode(request: pytest.FixtureRequest) -> str:
    """A way to a bundle whose clusters go on."""
    return str(request.param)


@pytest.fixture(scope="module")
def champion(mode: str, sessions: Path, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of that mode."""
    return train(sessions, tmp_path_factory.mktemp(mode) / "bundle", options(**MODES[mode]))


@pytest.fixture(scope="module")
def later(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sessions in which two pages are new, and two are gone."""
    return write(renewed(120, 5), tmp_path_factory.mktemp("later"))


def test_a_bundle_goes_on_with_more_pages(
    champion: Path, mode: str, later: Path, options: Options, tmp_path: Path
) -> None:
    made = train(later, tmp_path / "next", options(**MODES[mode], warm_start=champion))
    before, after = load_bundle(champion, "cpu"), load_bundle(made, "cpu")
    known = before.vocabulary.pages
    assert after.vocabulary.pages[: len(known)] == known
    assert sorted(after.vocabulary.pages[len(known) :]) == ["banjo", "slippers"]
    assert after.vocabulary.shares[known.index("shoes")] == 0.0
    assert after.config.clusters == before.config.clusters
    visits = [Visit(str(i), [["home", page]] * 3) for i, page in enumerate(("boots", "drums"))]
    assert (after.posterior(visits).argmax(axis=1) == before.posterior(visits).argmax(axis=1)).all()
    forecast = after.forecast([Visit("s", [["home", "slippers", "slippers"]] * 4)])[0]
    assert "slippers" in [page for page, _ in forecast.pages]
    assert "went on from the bundle " + before.digest in (made / "README.md").read_text()


def test_the_first_judgement_is_of_the_champions_own_weights(
    champion: Path, mode: str, sessions: Path, options: Options, tmp_path: Path
) -> None:
    # On its own sessions and without a step of descent, the bundle that goes on predicts as its start does.
    made = train(sessions, tmp_path / "same", options(**MODES[mode], warm_start=champion, minutes=1e-9))
    before, after = load_bundle(champion, "cpu"), load_bundle(made, "cpu")
    visits = [Visit(str(i), [["home", "boots", "sandals"]] * (i + 1)) for i in range(4)]
    targets = [["home", "boots"]] * 4
    routed = before.routed(before.posterior(visits))
    prompts = [before.tokenizer.render([before.tokenizer.encode(p) for p in v.sessions]) for v in visits]
    encoded = [before.tokenizer.encode(target) for target in targets]
    old, new = (one.predictor.nll(prompts, routed, encoded) for one in (before, after))
    assert new == pytest.approx(old, abs=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_old_rows_and_cluster_tokens_keep_their_meaning(tied: bool) -> None:
    torch.manual_seed(0)
    model = build("llama", 10 + 2, 16, 1, 2, 32)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.randn(12, 16))
    old_in, old_out = (layer.weight.detach().clone() for layer in (model.get_input_embeddings(), model.lm_head))
    tokens = torch.tensor([[10, 1, 5, 6, 2, 1]])  # a cluster token, then a session
    before = LanguageModel(model).logits(tokens)
    grown = grow(model, 10, 13, 2, seed=3)
    for old, layer in ((old_in, grown.get_input_embeddings()), (old_out, grown.get_output_embeddings())):
        assert layer.weight.shape == (15, 16)
        assert torch.equal(layer.weight[:10], old[:10]) and torch.equal(layer.weight[13:], old[10:])
        fresh, pages = layer.weight[10:13], old[len(SPECIALS) : 10]
        assert fresh.std() < 3 * pages.std() and not torch.equal(fresh[0], fresh[1])
    after = LanguageModel(grown).logits(torch.where(tokens == 10, 13, tokens))
    assert torch.allclose(after[..., :10], before[..., :10], atol=1e-5)


def test_a_vocabulary_only_grows() -> None:
    first = Vocabulary.fit({"b": 3, "a": 9, "rare": 1}, {"a": 2, "b": 1, "rare": 1}, 4, 2)
    grown = Vocabulary.fit({"c": 5, "b": 9, "d": 7, "rare": 1}, {"c": 1, "b": 2, "d": 4}, 4, 2, first.pages)
    assert grown.pages == ["a", "b", "d", "c"] and grown.shares == [0.0, 0.5, 1.0, 0.25]


def test_chains_go_on_from_the_champions(champion: Path, mode: str, later: Path, options: Options) -> None:
    if mode == "kmeans":
        pytest.skip("K-means has no chains")
    start = Start.of(champion)
    corpus = read_corpus(later)
    vocabulary = Vocabulary.fit(dict.fromkeys(corpus.names, 9), {}, 1, 1, start.vocabulary.pages)
    chains, old = start.chains(vocabulary), start.chains(start.vocabulary)
    assert chains.size == len(vocabulary) and np.allclose(chains.marginals.sum(axis=1), 1.0)
    heads, tails = np.array([1, 4, 5]), np.array([4, 5, 2])
    assert np.allclose(
        np.diff(chains.log_probabilities(heads, tails), axis=1), np.diff(old.log_probabilities(heads, tails), axis=1),
        atol=0.2,
    )  # fmt: skip
    users = np.arange(len(corpus.users))
    tokens = np.array([vocabulary.tokens()[name] for name in corpus.names])
    held = np.array(corpus.returning())[:20]
    fitted, choices = refit_chains(corpus, users, held, tokens, chains, MixtureOptions(smoothings=(8.0, 50.0)))
    _, best = fit_chains(corpus, users, held, tokens, len(vocabulary), MixtureOptions(clusters=[2], restarts=2))
    assert fitted.clusters == start.config.clusters and set(choices.by_smoothing) == {8.0, 50.0}
    assert choices.nll < best.nll + 0.1


def test_what_cannot_go_on_is_said(champion: Path, mode: str, options: Options, tmp_path: Path) -> None:
    pages = ["home", "boots", "drums", "piano", "sandals", "basket", "thank you"]
    same = options(**MODES[mode])
    assert obstacle(champion, same, pages) is None
    assert obstacle(champion, options(**MODES[mode], hidden_size=32), pages) == (
        "hidden_size is 32, but 16 in the champion"
    )
    assert "of the champion's pages are seen no more" in str(obstacle(champion, same, ["home", "new"]))
    with pytest.raises(BundleRefused):
        obstacle(tmp_path, same, pages)
