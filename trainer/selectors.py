"""A selector learned from soft targets: what it sees is a visitor's past, what it learns is who the visitor is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from models.chains import Chains
from models.config import Selector
from models.selector import DROPOUT, HIDDEN, SelectorNet, selector_input
from models.vocabulary import SPECIALS
from trainer.corpus import Corpus
from trainer.mixture import next_session_nll, posterior
from trainer.steps import Steps

MOST_EXAMPLES = 100_000  # histories that a selector learns from
GAIN = 1e-3  # nats a token


@dataclass(frozen=True)
class SelectorOptions:
    """How a selector learns (hetlm_findings, section 7)."""

    hidden: int = HIDDEN
    dropout: float = DROPOUT
    lr: float = 1e-3
    weight_decay: float = 1e-4
    batch: int = 256
    epochs: int = 30
    patience: int = 3  # epochs without a better validation cross-entropy
    seed: int = 0


@dataclass(frozen=True)
class Histories:
    """What a selector sees and learns of N histories; the target session has a part in `labels` only."""

    inputs: np.ndarray  # (N, D + K) float32: mean page embedding and log posterior of the first sessions
    logs: np.ndarray  # (N, K) the log posterior alone
    labels: np.ndarray  # (N, K) responsibilities of all sessions of the user, the target among them

    @classmethod
    def of(
        cls, corpus: Corpus, users: Sequence[int], chains: Chains, tokens: np.ndarray, embeddings: np.ndarray,
        prefixes: bool, seed: int = 0,
    ) -> "Histories":  # fmt: skip
        """Of each user with a target: every history before it (`prefixes`), or only the longest one."""
        returning = [corpus.sessions(user) for user in users if len(corpus.sessions(user)) > 1]
        whole = posterior(chains, Steps.of(corpus, returning, tokens, chains.size).log_likelihood(chains))
        lengths = [range(1, len(row)) if prefixes else [len(row) - 1] for row in returning]
        pasts = [row[:n] for row, cut in zip(returning, lengths, strict=True) for n in cut]
        owner = np.repeat(np.arange(len(returning)), [len(cut) for cut in lengths])
        if len(pasts) > MOST_EXAMPLES:
            kept = np.sort(np.random.default_rng(seed).choice(len(pasts), MOST_EXAMPLES, replace=False))
            pasts, owner = [pasts[i] for i in kept.tolist()], owner[kept]
        joint = Steps.of(corpus, pasts, tokens, chains.size).log_likelihood(chains) + np.log(chains.prior)
        logs = joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)
        z = mean_embeddings(corpus, pasts, tokens, embeddings)
        return cls(selector_input(z, logs), logs, whole[owner])


def mean_embeddings(
    corpus: Corpus, rows: Sequence[Sequence[int]], tokens: np.ndarray, embeddings: np.ndarray
) -> np.ndarray:
    """Mean embedding of the known pages of each list of sessions, zeros without any: (rows, D) float32."""
    seen = [tokens[corpus.pages[corpus.starts[row[0]] : corpus.starts[row[-1] + 1]]] for row in rows]
    columns = np.concatenate(seen)
    index = np.repeat(np.arange(len(rows)), [len(part) for part in seen])
    known = columns >= len(SPECIALS)
    ones = np.ones(int(known.sum()), dtype=np.float32)
    counts = sp.csr_matrix((ones, (index[known], columns[known])), shape=(len(rows), len(embeddings)))
    total = np.maximum(np.asarray(counts.sum(axis=1)), 1.0)
    means: np.ndarray = (counts @ embeddings.astype(np.float32)) / total
    return means.astype(np.float32)


def fit_selector(
    inputs: np.ndarray, labels: np.ndarray, held_inputs: np.ndarray, held_labels: np.ndarray,
    options: SelectorOptions | None = None,
) -> SelectorNet:  # fmt: skip
    """A network from inputs (N, D) to probabilities (N, K), of the epoch with the least validation cross-entropy."""
    o = options or SelectorOptions()
    torch.manual_seed(o.seed)
    net = SelectorNet(inputs.shape[1], labels.shape[1], o.hidden, o.dropout)
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    x, y, held_x, held_y = (torch.as_tensor(a, dtype=torch.float32) for a in (inputs, labels, held_inputs, held_labels))
    best, least, worse = _copy(net), float("inf"), 0
    for epoch in range(o.epochs):
        order = torch.from_numpy(np.random.default_rng([o.seed, epoch]).permutation(len(x)))
        net.train()
        for rows in order.split(o.batch):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
        net.eval()
        with torch.inference_mode():
            loss = float(torch.nn.functional.cross_entropy(net(held_x), held_y))
        worse = 0 if loss < least else worse + 1
        if loss < least:
            best, least = _copy(net), loss
        if worse >= o.patience:
            break
    net.load_state_dict(best)
    return net.eval()


def distil(
    corpus: Corpus, users: Sequence[int], held: Sequence[int], chains: Chains, tokens: np.ndarray,
    embeddings: np.ndarray, options: SelectorOptions | None = None,
) -> tuple[SelectorNet, dict[Selector, float]]:  # fmt: skip
    """A selector from the chains' responsibilities, and nats a token of the `held` users' last sessions.

    The nats are those of the chains, weighted by the selector (`mlp`) and by their own posterior (`mixture`).
    """
    o = options or SelectorOptions()
    learned = Histories.of(corpus, users, chains, tokens, embeddings, prefixes=True, seed=o.seed)
    judged = Histories.of(corpus, held, chains, tokens, embeddings, prefixes=False)
    net = fit_selector(learned.inputs, learned.labels, judged.inputs, judged.labels, o)
    last = [corpus.sessions(user)[-1:] for user in held if len(corpus.sessions(user)) > 1]
    steps = Steps.of(corpus, last, tokens, chains.size)
    logs, count = steps.log_likelihood(chains), float(steps.counts.sum())
    with torch.inference_mode():
        shares = torch.softmax(net(torch.from_numpy(judged.inputs)), dim=1).double().numpy()
    return net, {
        "mlp": float(next_session_nll(shares, logs).sum()) / count,
        "mixture": float(next_session_nll(np.exp(judged.logs), logs).sum()) / count,
    }


def router_of_choice(nats: Mapping[Selector, float]) -> Selector:
    """Who routes: the network only where it is better by GAIN, for it needs the sessions and not the sums alone."""
    return "mlp" if nats["mlp"] < nats["mixture"] - GAIN else "mixture"


def _copy(net: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}
