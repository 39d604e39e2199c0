"""The model card: what a bundle is, what it was trained on, and how it was judged."""

from datetime import UTC, datetime

from models.config import BundleConfig
from trainer.contenders import BUNDLE
from trainer.figures import Figure
from trainer.judging import Judgement
from trainer.measures import HEADLINE, OUTCOMES
from trainer.portraits import portraits

HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- browsecast
- clickstream
- next-session-prediction
- {architecture}
---

# Browsecast bundle: {clusters} x {architecture}

Predicts the next session of a visitor from the sessions before: the pages to expect, the most likely path, and the
probabilities of a cart and a purchase. {grouped}
{parameters:,} parameters in all, one token for each of {pages:,} pages.

Load it with `models.bundle.load_bundle`, or one predictor with `transformers`:
`AutoModelForCausalLM.from_pretrained("predictors/0")`. Token i + 4 is page i of vocabulary.json.
"""
GROUPED = {
    "behaviour": "Visitors are grouped by how they browse, with a mixture of Markov chains fitted by EM.",
    "paper": "Visitors are grouped by the actor-critic training of HeTLM (Algorithm 1 of the paper).",
    "kmeans": "Visitors are grouped by K-means on the embeddings of the pages they saw.",
}
SERVED = {
    "separate": "Each of {clusters} clusters has a language model of its own",
    "lora": "One language model has a low-rank adapter for each of {clusters} clusters",
    "token": "One language model is told by a token which of {clusters} clusters a visitor is in",
}
LIMITS = """## Limits

It knows only the pages of its vocabulary, and only the kinds of visitors that the data held. Clusters need not beat a
single model: `browsecast evaluate --contenders all` with the training sessions (--train) trains single models beside it
and says plainly whether they help."""


def card(config: BundleConfig, pages: int, parameters: int, judgement: Judgement, source: dict[str, str]) -> str:
    """The card in Markdown. `judgement`: the bundle beside baselines on validation users; `source`: the data, in words.

    `parameters`: of the predictors of all clusters together.
    """
    header = HEADER.format(
        architecture=config.architecture, clusters=config.clusters, parameters=parameters, pages=pages,
        grouped=_grouped(config),
    )  # fmt: skip
    data = ["## Data", "", *(f"- {name}: {value}" for name, value in source.items())]
    parts = [[header], data, _figures(judgement), _outcomes(config), _clusters(config, judgement), [LIMITS]]
    return "\n".join(line for part in parts for line in [*part, ""])


def _grouped(config: BundleConfig) -> str:
    if config.clusters == 1:
        return "One model serves all visitors."
    return f"{GROUPED[config.mode]} {SERVED[config.backend].format(clusters=config.clusters)}."


def day(ms: int) -> str:
    """A UTC date and time to the minute."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _figures(judgement: Judgement) -> list[str]:
    users = len(judgement.rows[BUNDLE])
    return [
        "## Figures",
        "",
        f"On the last sessions of {users:,} validation users, whose sessions no weight was fitted to; but the",
        "number of clusters, when to stop, decoding and calibration were chosen on these users, so judge the bundle",
        "anew on later data (`browsecast evaluate`).",
        "With 95 % bootstrap intervals; lower is better for log losses and NLL. Of the expected set and the",
        "probabilities, but for path iou, which is of the greedy path.",
        "",
        "| predictor | " + " | ".join(name.replace("_", " ") for name in HEADLINE) + " |",
        "|" + " --- |" * (len(HEADLINE) + 1),
        *(
            f"| {name} | " + " | ".join(_cell(columns[key]) for key in HEADLINE) + " |"
            for name, columns in judgement.figures.items()
        ),
    ]


def _outcomes(config: BundleConfig) -> list[str]:
    rows = []
    for name in OUTCOMES:
        outcome = getattr(config, name)
        pages = ", ".join(outcome.pages) or "learned from all pages"
        rows.append(f"| {name} | {outcome.base_rate:.3f} | {outcome.source} | {outcome.threshold:.3f} | {pages} |")
    return [
        "## Outcomes", "",
        "| outcome | share of training sessions | probability from | predicted from | pages that mark it |",
        "| --- | --- | --- | --- | --- |", *rows,
    ]  # fmt: skip


def _clusters(config: BundleConfig, judgement: Judgement) -> list[str]:
    told = {one.cluster: one.words for one in portraits(judgement.rows[BUNDLE], config.clusters)}
    return [
        "## Clusters", "",
        "| cluster | training users | who they are |", "| --- | --- | --- |",
        *(
            f"| {k} | {users:,} | {told.get(k, 'no validation user is in it')} |"
            for k, users in enumerate(config.cluster_users)
        ),
    ]  # fmt: skip


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
