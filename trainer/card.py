"""The model card: what a bundle is, what it was trained on, and how it was judged."""

from datetime import UTC, datetime

from models.config import BundleConfig
from trainer.judging import FIGURES, PREDICTORS, Figure, Figures

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
probabilities of a cart and a purchase. Each of {clusters} clusters of visitors has a language model of its own, with
one token a page ({parameters:,} parameters each, {pages:,} pages).

Load it with `models.bundle.load_bundle`, or one predictor with `transformers`:
`AutoModelForCausalLM.from_pretrained("predictors/0")`. Token i + 4 is page i of vocabulary.json.
"""


def card(config: BundleConfig, pages: int, parameters: int, alone: Figures, users: int, source: dict[str, str]) -> str:
    """The card in Markdown. `alone`: figures on `users` validation users; `source`: what the data was, in words."""
    kind, clusters = config.architecture, config.clusters
    lines = [HEADER.format(architecture=kind, clusters=clusters, parameters=parameters, pages=pages)]
    lines += ["## Data", "", *(f"- {name}: {value}" for name, value in source.items()), ""]
    lines += [
        "## Figures",
        "",
        f"On the last sessions of {users:,} validation users, whose sessions no weight was fitted to; but decoding",
        "and calibration were chosen on these users, so judge the bundle anew on later data (`browsecast evaluate`).",
        "Means with 95 % bootstrap intervals; lower is better for log losses and NLL.",
        "",
        "| predictor | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |",
        "|" + " --- |" * (len(FIGURES) + 1),
    ]
    lines += [
        f"| {name} | " + " | ".join(_cell(alone[name][figure]) for figure in FIGURES) + " |" for name in PREDICTORS
    ]
    lines += [
        "",
        "## Clusters",
        "",
        "| cluster | training users |",
        "| --- | --- |",
        *(f"| {k} | {users:,} |" for k, users in enumerate(config.cluster_users)),
        "",
        "## Limits",
        "",
        "It knows only the pages of its vocabulary, and only the kinds of visitors that the data held. K-means on page",
        "names groups visitors by topic, not by behaviour; such clusters need not beat a single model.",
        "",
    ]
    return "\n".join(lines)


def day(ms: int) -> str:
    """A UTC date and time to the minute."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _cell(figure: Figure | None) -> str:
    return "-" if figure is None else f"{figure.mean:.3f} [{figure.low:.3f}, {figure.high:.3f}]"
