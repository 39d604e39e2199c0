"""Selectors: how a visitor is spread over the clusters. One interface for every mode."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from models.config import SELECTOR, Embedding
from models.config import Selector as Kind
from models.encoder import Encoder, text_of
from models.manifest import BundleRefused
from models.routing import Router
from models.visit import Visit, recent
from models.vocabulary import SPECIALS, Tokenizer

HIDDEN = 128
DROPOUT = 0.1
FLOOR = -12.0  # a log posterior below this says no more to the network than this
PREFIX = "mlp."

# B visits -> z (B, D) float32, of the newest pages of each: a live visit may bring more of them than an archived one.
Embed = Callable[[Sequence[Visit]], np.ndarray]


class Selector(Protocol):
    """P(cluster | visit) of every visit."""

    clusters: int

    def posterior(self, visits: Sequence[Visit]) -> np.ndarray:
        """(B, K) float64; each row sums to 1."""
        ...


class Posterior:
    """The router's own posterior: from the visit's running sums, or from its sessions where it has none."""

    def __init__(self, router: Router) -> None:
        self.router, self.clusters = router, router.clusters

    def posterior(self, visits: Sequence[Visit]) -> np.ndarray:
        """See Selector."""
        shares: np.ndarray = np.exp(self.logs(visits))
        return shares

    def logs(self, visits: Sequence[Visit]) -> np.ndarray:
        """log P(cluster | visit): (B, K)."""
        rows = [self.router.log_posterior(self._sums(visit)) for visit in visits]
        return np.array(rows, dtype=np.float64).reshape(len(visits), self.clusters)

    def _sums(self, visit: Visit) -> list[float]:
        if visit.routing is not None and len(visit.routing) == self.router.width:
            return visit.routing
        return self.router.route(visit.sessions)


class SelectorNet(nn.Module):
    """inputs -> hidden -> K logits, ReLU, dropout in training (HeTLM, section 1.2: 384 -> 128 -> K)."""

    def __init__(self, inputs: int, clusters: int, hidden: int = HIDDEN, dropout: float = DROPOUT) -> None:
        super().__init__()
        self.inputs, self.clusters = inputs, clusters
        self.hidden = nn.Linear(inputs, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, clusters)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) -> logits (B, K)."""
        logits: Tensor = self.output(self.dropout(torch.relu(self.hidden(x))))
        return logits


class MLPSelector:
    """A network on the embedding of the visit's sessions and, with a mixture's router, on its log posterior."""

    def __init__(self, net: SelectorNet, embed: Embed, router: Router | None = None) -> None:
        """`router`: whose log posterior follows z in the input; None for z alone."""
        self.clusters = net.clusters
        self._net = net.double().eval()  # in double precision a visit's company in a batch changes nothing
        self._embed, self._known = embed, None if router is None else Posterior(router)

    def posterior(self, visits: Sequence[Visit]) -> np.ndarray:
        """See Selector."""
        if not visits:
            return np.zeros((0, self.clusters))
        z = self._embed(visits).astype(np.float64)
        x = z if self._known is None else selector_input(z, self._known.logs(visits))
        with torch.inference_mode():
            shares: np.ndarray = torch.softmax(self._net(torch.from_numpy(x)), dim=1).numpy()
        return shares


class PageMeans:
    """z as the mean embedding of the known pages of a visit's sessions; zeros without any."""

    def __init__(self, embeddings: np.ndarray, tokenizer: Tokenizer) -> None:
        """`embeddings` (V, D): a row for each token."""
        self._embeddings, self._tokenizer = embeddings, tokenizer

    def __call__(self, visits: Sequence[Visit]) -> np.ndarray:
        """(B, D) float32."""
        return np.stack([self._mean(recent(visit.sessions)) for visit in visits])

    def _mean(self, sessions: Sequence[Sequence[str]]) -> np.ndarray:
        tokens = [token for pages in sessions for token in self._tokenizer.encode(pages) if token >= len(SPECIALS)]
        rows = self._embeddings[tokens] if tokens else np.zeros((1, self._embeddings.shape[1]))
        mean: np.ndarray = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


class SessionTexts:
    """z as the sentence encoder's embedding of a visit's sessions as text (the paper's f_theta)."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, visits: Sequence[Visit]) -> np.ndarray:
        """(B, 384) float32."""
        return self._encoder.encode([text_of(recent(visit.sessions)) for visit in visits])


def make_embed(
    embedding: Embedding, embeddings: np.ndarray, tokenizer: Tokenizer, encoder: Path | None = None, device: str = "cpu"
) -> Embed:
    """The encoder on the sessions as text, or the mean of the page embeddings (V, D). Raises EncoderMissing."""
    return SessionTexts(Encoder(encoder, device)) if embedding == "text" else PageMeans(embeddings, tokenizer)


def selector_input(z: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """[z ; log posterior], the latter cut off at FLOOR: (N, D), (N, K) -> (N, D + K)."""
    return np.concatenate([z, np.maximum(logs, FLOOR).astype(z.dtype)], axis=1)


def selector_tensors(net: nn.Module) -> dict[str, np.ndarray]:
    """The network as `make_selector` reads it."""
    return {PREFIX + name: tensor.detach().float().cpu().numpy() for name, tensor in net.state_dict().items()}


def make_selector(
    bundle_path: Path, selector: Kind, clusters: int, router: Router, embed: Embed, tensors: Mapping[str, np.ndarray]
) -> Selector:
    """The selector of a bundle with `clusters` clusters, from the tensors of its file. Raises BundleRefused.

    A network whose input is wider than z (D, found by asking `embed`) sees the router's log posterior too.
    """
    if selector != "mlp":
        if router.clusters != clusters:
            raise BundleRefused(bundle_path, SELECTOR, f"{router.clusters} clusters, but the config says {clusters}")
        return Posterior(router)
    state = {name.removeprefix(PREFIX): torch.tensor(t) for name, t in tensors.items() if name.startswith(PREFIX)}
    width = embed([Visit("", [])]).shape[1]
    try:
        hidden, inputs = state["hidden.weight"].shape
        net = SelectorNet(inputs, clusters, hidden)
        net.load_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        raise BundleRefused(bundle_path, SELECTOR, f"no network for {clusters} clusters ({error})") from None
    if inputs not in (width, width + router.clusters):
        what = f"the network reads {inputs} numbers, but an embedding has {width} and the posterior {router.clusters}"
        raise BundleRefused(bundle_path, SELECTOR, what)
    return MLPSelector(net, embed, router if inputs > width else None)
