"""retrieval.html: one page that needs nothing else, with the verdict, tables, pictures and examples."""

from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from trainer.interactions import NONE
from trainer.rankings import Judged
from trainer.reportpage import Page, template
from trainer.retrieval_metrics import hits
from trainer.retrieval_pictures import by_clicks, depths, differences
from trainer.retrieval_report import HEADLINE, RetrievalReport, standing
from trainer.retrievers import Ranking

PAGE = "retrieval.html"
TEMPLATE = "retrieval.html.j2"
EXAMPLES, SHOWN = 5, 12  # cases, and items of each
TITLES = {
    "recall_10": "Recall@10", "recall_50": "Recall@50", "recall_100": "Recall@100", "ndcg_10": "nDCG@10",
    "ndcg_50": "nDCG@50", "ndcg_100": "nDCG@100", "mrr_100": "MRR@100", "auc_100": "AUC@100", "precision_1": "P@1",
    "precision_3": "P@3",
}  # fmt: skip


class Brought(NamedTuple):
    """A retrieved item and the click that brought it."""

    item: str
    seed: str | None
    hit: bool


class Shown(NamedTuple):
    """What a user had clicked, newest first, what was retrieved, and what was then clicked."""

    user: str
    history: list[str]
    items: list[Brought]
    came: list[Page]


def write_page(report: RetrievalReport, judged: Judged, ranking: Ranking, directory: Path) -> Path:
    """Write retrieval.html; `ranking` is that of the report's own retriever. Returns the path."""
    path = directory / PAGE
    path.write_text(html(report, judged, ranking), encoding="utf-8")
    return path


def html(report: RetrievalReport, judged: Judged, ranking: Ranking) -> str:
    """The page."""
    return template(TEMPLATE).render(
        report=report,
        headline=HEADLINE,
        titles=TITLES,
        best={
            name: max(figure.mean for columns in report.figures.values() if (figure := columns[name]) is not None)
            for name in HEADLINE
        },
        clearly=standing,
        differences=Markup(differences(report.differences)) if report.differences else "",
        depths=Markup(depths(report.depths, report.ours)),
        by_clicks=Markup(by_clicks(report.by_clicks, report.ours)),
        examples=examples(judged, ranking),
    )


def examples(judged: Judged, ranking: Ranking) -> list[Shown]:
    """Cases from well to badly foretold, evenly over the place of the first label."""
    cases, names = judged.cases, judged.cases.log.items
    hit = hits(ranking.items, cases)
    place = [(int(row.argmax()) if row.any() else len(row)) for row in hit]
    ordered = sorted(range(len(cases)), key=lambda case: (place[case], cases.log.users[cases.user[case]]))
    chosen = dict.fromkeys(ordered[i * (len(ordered) - 1) // EXAMPLES] for i in range(EXAMPLES))
    found = []
    for case in chosen:
        listed = ranking.items[case, :SHOWN]
        labels = cases.labels[cases.starts[case] : cases.starts[case + 1]].tolist()
        found.append(
            Shown(
                user=cases.log.users[cases.user[case]],
                history=[names[item] for item in cases.history(case, SHOWN)[::-1].tolist()],
                items=[
                    Brought(names[item], None if seed == NONE else names[seed], bool(right))
                    for item, seed, right in zip(listed.tolist(), ranking.seeds[case].tolist(), hit[case], strict=False)
                    if item != NONE
                ],
                came=[Page(names[label], label in ranking.items[case]) for label in labels],
            )
        )
    return found
