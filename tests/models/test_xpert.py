"""XPert's operators: the paper's toy example, and what each property of the design promises."""

import numpy as np
import pytest
import torch

from models.catalogue import Catalogue
from models.items import WEIGHTS, ItemsFile, ItemTable, RetrieverConfig, indexed, unit
from models.retriever import operator_of
from models.search import exact
from models.xpert import FEEDFORWARD_WEIGHTS, Morph, Operator, XPert

WIDTH, SEEDS = 8, 3
OPERATORS: tuple[Operator, ...] = ("identity", "shared", "residual", "personal")


def vectors(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(unit(np.random.default_rng(seed).normal(size=(count, WIDTH))))


def model(operator: Operator, seed: int = 0) -> XPert:
    """Of random weights, as after a training."""
    torch.manual_seed(seed)
    made = XPert(operator, WIDTH, SEEDS)
    with torch.no_grad():
        for weights in made.parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return made.eval()


def asked(made: XPert, seeds: torch.Tensor, history: torch.Tensor, opens: bool = False) -> torch.Tensor:
    """Queries of one visitor: (S, D), (H, D) -> (S, D + 2)."""
    with torch.no_grad():
        z = made.user(history[None], torch.ones(1, len(history), dtype=torch.bool))
        queries: torch.Tensor = made(seeds[None], torch.ones(1, len(seeds), dtype=torch.bool), z, torch.tensor([opens]))
    return queries[0]


# ---------------------------------------------------------------- the paper


def morph_of(whole: torch.Tensor) -> Morph:
    """For whatever visitor: I + R^T is the matrix `whole`."""
    width = len(whole)
    morph = Morph(width, 1, "identity")
    with torch.no_grad():
        morph.create.weight.zero_()
        morph.create.bias.copy_((whole - torch.eye(width)).T.flatten())
    return morph


@pytest.mark.parametrize(
    ("item", "event", "retrieved"),
    [
        ((1, 1), (1, 1), set()),
        ((1, 1), (0, 1), {2}),
        ((0.5, 0.5), (1, 1), {2, 3}),
        ((0.5, 0.5), (-1, 1), {1, 2}),
        ((1, 0.5), (0, 0), {2, 4}),
        ((0.5, 0.25), (0.5, 0), {2, 3, 4}),
        ((0.5, 0.5), (0, 0), {1, 2, 3, 4}),
    ],
)
def test_two_sided_morphs_retrieve_what_the_figures_show(
    item: tuple[float, float], event: tuple[float, float], retrieved: set[int]
) -> None:
    """Figures 2 and 5: items within a distance of 1 of the morphed event, after all items were morphed.

    The catalogue holds the items as they are. |Pa - Qe|^2 <= 1 is 2 <a, P^T Q e> - |Pa|^2 + 1 - |Qe|^2 >= 0: a query
    that one morph makes, a popularity that counts against an item, and a bias.
    """
    items, seed = np.array([(-2, 0), (0, 2), (2, 0), (0, -2)], dtype=np.float32), torch.tensor([[[1.0, 1.0]]])
    p, q = torch.diag(torch.tensor(item, dtype=torch.float)), torch.diag(torch.tensor(event, dtype=torch.float))
    z = torch.ones(1, 64)
    with torch.no_grad():
        folded, alone = morph_of(p.T @ q)(seed, z)[0, 0].numpy(), morph_of(q)(seed, z)[0, 0].numpy()
    clicks = np.expm1(((items @ p.numpy().T) ** 2).sum(axis=1))
    tensors = {"vectors": items / 2, "clicks": clicks, "clusters": np.zeros(4), "centroids": np.zeros((1, 2))}
    catalogue = Catalogue(ItemTable(ItemsFile(["1", "2", "3", "4"], RetrieverConfig()), tensors, "sha256:figures"))
    query = np.array([[*(2 * 2 * folded), -1.0, 1 - alone @ alone]], dtype=np.float32)
    found = exact(catalogue, query, [], 4)
    near = found.rows[found.scores >= -1e-5]
    assert {int(catalogue.ids[row]) for row in near.tolist()} == retrieved


def test_the_items_morph_folds_into_the_query() -> None:
    """<P E(a), Q E(e)> = <E(a), P^T Q E(e)>, and P^T Q is what `Morph` adds to the identity."""
    rng = np.random.default_rng(3)
    p, q = (torch.from_numpy(np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]).float() for _ in range(2))
    items, event = vectors(20), vectors(1, 1)
    with torch.no_grad():
        folded = morph_of(p.T @ q)(event[None], torch.ones(1, 64))[0, 0]
    torch.testing.assert_close(items @ folded, (items @ p.T) @ (q @ event[0]))


def test_a_morph_is_the_mean_over_heads_after_the_activation() -> None:
    torch.manual_seed(0)
    morph = Morph(WIDTH, 4, "relu")
    z = torch.randn(2, 64)
    with torch.no_grad():
        heads = morph.create(z).view(2, 4, WIDTH, WIDTH)
        made = morph.morphs(z)
        assert (made >= 0).all()
        torch.testing.assert_close(made, heads.clamp(min=0).mean(dim=1))
        morph.activation = "identity"
        torch.testing.assert_close(morph.morphs(z), heads.mean(dim=1))


def test_the_default_initialisation_is_near_no_morph_and_can_learn() -> None:
    torch.manual_seed(0)
    made = XPert("personal", 64, SEEDS, heads=10, activation="relu").eval()
    seeds = torch.nn.functional.normalize(torch.randn(50, 5, 64), dim=2)
    known = torch.ones(50, 5, dtype=torch.bool)
    queries = made(seeds, known, made.user(seeds, known), torch.zeros(50, dtype=torch.bool))[:, :, :64]
    cosines = (queries * seeds).sum(dim=2)
    assert cosines.min() > 0.99
    (1 - queries[:, 0] @ queries[:, 1].T).sum().backward()
    assert isinstance(made.change, Morph)
    gradients = made.change.create.weight.grad
    assert gradients is not None and (gradients != 0).float().mean() > 0.2, "ReLU is not dead at the start"


def test_an_aggregation_of_any_inner_width_is_rebuilt_from_its_weights() -> None:
    """The published model has 512 there, or 1,024; our own has 256."""
    for made in (XPert("personal", WIDTH, SEEDS), XPert("personal", WIDTH, SEEDS, feedforward=512)):
        tensors = {WEIGHTS + name: one.numpy() for name, one in made.state_dict().items()}
        tensors["vectors"] = vectors(4).numpy()
        rebuilt = operator_of(RetrieverConfig("personal"), tensors)
        found = asked(rebuilt, vectors(2), vectors(6, 1))
        torch.testing.assert_close(found, asked(made.eval(), vectors(2), vectors(6, 1)))
    assert tensors[WEIGHTS + FEEDFORWARD_WEIGHTS].shape == (512, WIDTH)
    del tensors[WEIGHTS + FEEDFORWARD_WEIGHTS]
    with pytest.raises(ValueError, match="do not fit the ranker 'personal'"):
        operator_of(RetrieverConfig("personal"), tensors)


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("operator", OPERATORS)
def test_queries_are_unit_and_carry_the_prior_and_the_bias_of_their_rank(operator: Operator) -> None:
    made = model(operator)
    queries = asked(made, vectors(5), vectors(6, 1), opens=True)
    torch.testing.assert_close(torch.linalg.vector_norm(queries[:, :WIDTH], dim=1), torch.ones(5))
    assert queries[:, WIDTH].tolist() == [float(made.prior.detach()[1])] * 5
    assert queries[:, WIDTH + 1].tolist() == [float(made.seed_bias.detach()[min(rank, SEEDS - 1)]) for rank in range(5)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_without_morph_queries_are_the_seeds(operator: Operator) -> None:
    """R = 0 is per-event retrieval that is not personal, exactly."""
    torch.manual_seed(0)
    made = XPert(operator, WIDTH, SEEDS).eval()
    if isinstance(made.change, Morph):
        torch.nn.init.zeros_(made.change.create.weight)
        torch.nn.init.zeros_(made.change.create.bias)
    seeds = vectors(3)
    torch.testing.assert_close(asked(made, seeds, vectors(6, 1))[:, :WIDTH], seeds)


def test_who_has_no_history_has_no_morph() -> None:
    """z = 0 would give R = mean of act(b)."""
    made, seeds = model("personal"), vectors(3)
    nothing = torch.zeros(1, 4, WIDTH)
    with torch.no_grad():
        z = made.user(nothing, torch.zeros(1, 4, dtype=torch.bool))
        assert z is not None and not z.any()
        queries = made(seeds[None], torch.ones(1, 3, dtype=torch.bool), z, torch.tensor([False]))
    torch.testing.assert_close(queries[0, :, :WIDTH], seeds)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_order_of_seeds_and_of_history_changes_nothing_but_the_bias(operator: Operator) -> None:
    made, seeds, history = model(operator), vectors(3), vectors(6, 1)
    turned = asked(made, seeds[[2, 0, 1]], history[[5, 3, 1, 0, 2, 4]])
    torch.testing.assert_close(turned[:, :-1], asked(made, seeds, history)[[2, 0, 1], :-1])


@pytest.mark.parametrize("operator", OPERATORS)
def test_padding_changes_nothing(operator: Operator) -> None:
    """And a visitor with nothing known asks for popularity alone."""
    made, seeds, history = model(operator), vectors(2), vectors(3, 1)
    padded_seeds, padded_history = torch.zeros(2, 4, WIDTH), torch.zeros(2, 5, WIDTH)
    padded_seeds[0, :2], padded_history[0, :3] = seeds, history
    known, remembered = torch.zeros(2, 4, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    known[0, :2], remembered[0, :3] = True, True
    with torch.no_grad():
        z = made.user(padded_history, remembered)
        queries = made(padded_seeds, known, z, torch.tensor([False, False]))
    torch.testing.assert_close(queries[0, :2], asked(made, seeds, history), atol=1e-5, rtol=1e-5)
    index = torch.from_numpy(indexed(vectors(20, 2).numpy(), np.log1p(np.arange(20.0))))
    scores = (queries @ index.T).amax(dim=1)
    torch.testing.assert_close(scores[1], float(made.prior.detach()[0]) * torch.log1p(torch.arange(20.0)))


def test_a_large_prior_is_popularity() -> None:
    made = model("personal")
    with torch.no_grad():
        made.prior[0] = 100.0
    clicks = np.random.default_rng(4).permutation(50)
    index = torch.from_numpy(indexed(vectors(50, 2).numpy(), np.log1p(clicks)))
    scores = (asked(made, vectors(3), vectors(6, 1)) @ index.T).amax(dim=0)
    assert scores.argsort(descending=True).tolist() == np.argsort(-clicks).tolist()
