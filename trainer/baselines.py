"""Baselines that must be fitted: on the sessions that the bundle was trained on, and judged as the bundle is.

All but the trees are forecasters of their own, so they too are shrunk to the visitor's own frequencies, choose an
expected set by the same rule, and calibrate their outcomes on the same validation users.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from models.bundle import Device, load_bundle, pick_device
from models.forecaster import Forecaster
from models.outcomes import OutcomeHead
from models.predictors import Predictor
from models.routing import CentroidRouter
from models.selector import Posterior
from models.vocabulary import Tokenizer
from trainer.boosting import Features, fit_boosting
from trainer.calibration import CALIBRATION_TARGETS, calibrate
from trainer.contenders import KMEANS_LMS, LARGE_LM, SMALL_LM, Bundle, Contender, parameters_of
from trainer.controls import bundle_options, control, control_options, went_on
from trainer.corpus import Corpus, read_training, split
from trainer.errors import TrainingError
from trainer.examples import Example, examples
from trainer.gru import GRUPredictor, Schedule, fit_gru
from trainer.markov import ChainPredictor
from trainer.material import vocabulary_of
from trainer.mixture import MixtureOptions, fit_chains
from trainer.options import TrainOptions
from trainer.windows import batch_count, page_tokens, windows

MARKOV = "first-order Markov"
MIXTURE = "Markov mixture"
BOOSTING = "gradient boosting"
BOOSTING_MIXTURE = "gradient boosting with the mixture"
GRU = "GRU4Rec"
FAST = (MARKOV, MIXTURE, BOOSTING, BOOSTING_MIXTURE)
ALL = (*FAST, GRU, SMALL_LM, LARGE_LM, KMEANS_LMS)
GROUPS = {"fast": FAST, "all": ALL}

TREE_TARGETS = 5  # last sessions of each training user that the trees learn from
MOST_TREE_EXAMPLES = 100_000
GRU_WIDTH = 64  # its least width: with 163 pages 93,000 parameters (hetlm_findings, section 3)
GRU_LR = 4e-3  # at that width; a bundle of pretrained models learns far too slowly for a new network
FIRST_ORDER = MixtureOptions(clusters=(1,), smoothings=(1.0, 3.0, 8.0, 20.0, 50.0))


def fit_contenders(
    train: Path,
    forecaster: Forecaster,
    parameters: int,
    which: Sequence[str],
    cache: Path,
    seed: int = 0,
    device: Device = "auto",
    progress: Any = None,
) -> list[Contender]:
    """The baselines named in `which`, in the order of ALL, fitted on the sessions in `train`.

    `parameters` counts the numbers in the bundle's predictors: the large model has at least as many. Language models
    are kept in `cache` and trained only once; beside a bundle that went on from another there are none. `progress` is a
    rich Progress or None. Raises TrainingError for an unknown name, when the bundle's config does not say how it was
    trained, or when language models would know other pages than it does.
    """
    unknown = [name for name in which if name not in ALL]
    if unknown:
        raise TrainingError(f"There is no baseline called {', '.join(unknown)}. Take some of: {', '.join(ALL)}.")
    fitting = _Fitting.of(Path(train), forecaster, seed, device, progress)
    plain: dict[str, Callable[[], Contender]] = {
        MARKOV: fitting.markov, MIXTURE: fitting.mixture, BOOSTING: fitting.boosting,
        BOOSTING_MIXTURE: fitting.boosting_mixture, GRU: fitting.gru,
    }  # fmt: skip
    told = fitting.controls(parameters) if any(name not in plain for name in which) else {}
    contenders = [fit() for name, fit in plain.items() if name in which]
    return contenders + [fitting.control(name, options, cache) for name, options in told.items() if name in which]


class Fitted(Bundle):
    """A fitted forecaster in a report."""

    def __init__(self, name: str, forecaster: Forecaster, parameters: int) -> None:
        super().__init__(forecaster, parameters)
        self.name = name


@dataclass(frozen=True)
class _Fitting:
    """What baselines are fitted on: the bundle's own split of its sessions, its vocabulary and its schedule."""

    sessions: Path
    forecaster: Forecaster
    corpus: Corpus
    users: np.ndarray  # training users
    held_users: np.ndarray  # validation users
    options: TrainOptions
    seed: int
    device: Device
    progress: Any

    @classmethod
    def of(cls, train: Path, forecaster: Forecaster, seed: int, device: Device, progress: Any) -> "_Fitting":
        options = bundle_options(forecaster.config.training)
        corpus, apart = read_training(train)
        users, held = split(corpus, options.validation_share, options.seed, apart)
        return cls(train, forecaster, corpus, users, held, options, seed, device, progress)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Token of each page of the corpus."""
        return page_tokens(self.corpus, self.forecaster.vocabulary.tokens())

    @cached_property
    def held(self) -> list[Example]:
        """What is calibrated on."""
        return self._examples(self.held_users, CALIBRATION_TARGETS)

    @cached_property
    def mixture_predictor(self) -> ChainPredictor:
        """Chains whose number validation chooses."""
        return self._chains(MixtureOptions(seed=self.seed))

    def markov(self) -> Contender:
        """One chain for everybody."""
        predictor = self._chains(dataclasses.replace(FIRST_ORDER, seed=self.seed))
        return self._fitted(MARKOV, predictor, predictor.parameters)

    def mixture(self) -> Contender:
        """The mixture of chains alone: its own next session, without a language model."""
        return self._fitted(MIXTURE, self.mixture_predictor, self.mixture_predictor.parameters)

    def gru(self) -> Contender:
        """A recurrent network for as many epochs as all phases of the bundle."""
        options = self.options
        width = max(GRU_WIDTH, options.hidden_size)
        plan = Schedule(
            epochs=options.epochs + options.fine_tune_epochs, batch=options.batch,
            lr=GRU_LR * (GRU_WIDTH / width) ** 0.5, weight_decay=options.weight_decay, patience=options.patience,
            seed=self.seed,
        )  # fmt: skip
        rows = windows(self.corpus, self.users.tolist(), self.tokens, options.context_tokens)
        prompts, targets = self._prompts(self.held), [self._tokenizer.encode(e.target) for e in self.held]

        def judge(predictor: GRUPredictor) -> float:
            return float(predictor.nll(prompts, None, targets).sum() / sum(len(target) + 1 for target in targets))

        advance = self._task(GRU, plan.epochs * batch_count(len(rows), plan.batch))
        device = pick_device(self.device)
        predictor = fit_gru(rows, len(self.forecaster.vocabulary), width, plan, judge, device, advance)
        return self._fitted(GRU, predictor, predictor.parameters)

    @cached_property
    def tree_examples(self) -> list[Example]:
        """What trees learn from."""
        few = np.random.default_rng(self.seed).permutation(self.users)[: MOST_TREE_EXAMPLES // TREE_TARGETS]
        return self._examples(np.sort(few), TREE_TARGETS)

    def boosting(self) -> Contender:
        """Trees on the visitor's history."""
        return self._trees(BOOSTING, Features(self.forecaster.vocabulary))

    def boosting_mixture(self) -> Contender:
        """Trees that also see the posterior of the mixture of chains."""

        def posterior(seen: Sequence[Example]) -> np.ndarray:
            return self.mixture_predictor.posterior(self._prompts(seen))

        return self._trees(BOOSTING_MIXTURE, Features(self.forecaster.vocabulary, posterior))

    def control(self, name: str, options: TrainOptions, cache: Path) -> Contender:
        """A bundle of other options."""
        place = control(options, self.sessions, self.corpus, cache, self.device, self.progress)
        return Fitted(name, load_bundle(place, self.device), parameters_of(place))

    def controls(self, parameters: int) -> dict[str, TrainOptions]:
        """Options of the language models beside a bundle with so many parameters."""
        ours = self.forecaster
        if went_on(ours):
            return {}
        pages = vocabulary_of(self.corpus, self.users, self.options.min_page_count).pages
        if pages != ours.vocabulary.pages:
            raise TrainingError(
                f"{self.sessions} holds other pages than the bundle knows, so the nats per token of language models "
                "trained on it could not be compared with the bundle's. Give the sessions that the bundle was trained "
                f"on (--train), or other contenders than {', '.join((SMALL_LM, LARGE_LM, KMEANS_LMS))}."
            )
        return control_options(self.options, ours.config.clusters, parameters, len(ours.vocabulary))

    def _chains(self, options: MixtureOptions) -> ChainPredictor:
        size = len(self.forecaster.vocabulary)
        chains, _ = fit_chains(self.corpus, self.users, self.held_users, self.tokens, size, options)
        return ChainPredictor(chains)

    def _trees(self, name: str, features: Features) -> Contender:
        return fit_boosting(name, self.tree_examples, self.held, features, self.seed, torch.get_num_threads())

    def _fitted(self, name: str, predictor: Predictor, parameters: int) -> Fitted:
        """The predictor in a forecaster with a single cluster, calibrated."""
        ours = self.forecaster
        one = CentroidRouter(ours.vocabulary.pages, np.zeros((len(ours.vocabulary.pages), 1)), "one cluster")
        config = msgspec.structs.replace(ours.config, clusters=1, soft=False)
        heads = [
            OutcomeHead(head.outcome, ours.vocabulary.tokens(), len(ours.vocabulary), head.weights)
            for head in ours.heads  # anew: without the bundle's chains, and calibrated apart
        ]
        forecaster = Forecaster(config, ours.vocabulary, one, Posterior(one), predictor, heads)
        calibrate(forecaster, self.held)
        return Fitted(name, forecaster, parameters)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self.forecaster.vocabulary)

    def _examples(self, users: np.ndarray, targets: int) -> list[Example]:
        return examples(self.corpus, users.tolist(), None, targets)  # no baseline here uses the bundle's router

    def _prompts(self, seen: Sequence[Example]) -> list[list[int]]:
        encode, render = self._tokenizer.encode, self._tokenizer.render
        return [render([encode(pages) for pages in example.visit.sessions]) for example in seen]

    def _task(self, name: str, total: int) -> Callable[[int], None]:
        if self.progress is None:
            return lambda done: None
        task = self.progress.add_task(name, total=total)
        return lambda done: self.progress.update(task, advance=done)
