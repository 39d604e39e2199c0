"""K-means on what mode "paper" begins with: the same clusters, and a bundle that routes by them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from models.bundle import load_bundle
from models.selector import PageMeans
from tests.trainer.conftest import shop, write
from trainer.checkpoints import Run
from trainer.corpus import read_corpus
from trainer.fit import train
from trainer.grouping import by_sessions, nearest
from trainer.material import Material
from trainer.options import TrainOptions
from trainer.paper import _start

Options = Callable[..., TrainOptions]


def test_its_clusters_are_those_that_the_published_algorithm_begins_with(
    sessions: Path, options: Options, tmp_path: Path
) -> None:
    store = Run(tmp_path / "run", {}, tmp_path / "log")
    material = Material.of(read_corpus(sessions), None, options(mode="kmeans", clusters=3), store, None)
    found = by_sessions(material, "pages")
    seen = material.examples(material.train_users, None)
    z = PageMeans(material.embeddings, material.tokenizer)([example.visit for example in seen])
    _, centers = _start(torch.tensor(z), 3, 0, store, 0)
    np.testing.assert_array_equal(found.tensors["centroids"], centers.numpy())
    wanted = torch.cdist(torch.tensor(z), centers).argmin(1).numpy()
    assert found.selector.posterior([example.visit for example in seen]).argmax(1).tolist() == wanted.tolist()
    returning = np.isin(material.train_users, material.corpus.returning())
    assert found.posterior.argmax(1)[returning].tolist() == wanted.tolist()
    assert len(set(wanted.tolist())) == 3 and len(found.posterior) == len(material.train_users)
    again = by_sessions(material, "pages")  # from what the run keeps
    np.testing.assert_array_equal(again.posterior, found.posterior)
    store.close()


def test_the_network_chooses_the_nearest_center() -> None:
    rng = np.random.default_rng(0)
    centers, z = (rng.normal(size=(count, 12)).astype(np.float32) for count in (5, 400))
    distances = np.square(z[:, None] - centers).sum(axis=2)
    logits = nearest(centers).eval()(torch.tensor(z)).detach().numpy()
    np.testing.assert_allclose(logits - logits[:, :1], distances[:, :1] - distances, atol=1e-4)


def test_a_bundle_of_texts_routes_by_the_nearest_center(options: Options, tmp_path: Path) -> None:
    rows = write(shop(40), tmp_path / "sessions")
    train(rows, tmp_path / "b", options(mode="kmeans", embedding="text", epochs=1, fine_tune_epochs=0))
    bundle = load_bundle(tmp_path / "b", "cpu")
    config = bundle.config
    assert (config.mode, config.selector, config.embedding, config.soft) == ("kmeans", "mlp", "text", False)
    assert config.encoder is not None and config.clusters == 2
