"""What a report measures: the name of every figure, what it means, and whether more or less is better."""

from typing import NamedTuple

OUTCOMES = ("cart", "purchase")
DECODINGS = {"": "expected", "path_": "path"}  # prefix of a figure's name -> the column that it is read from
PAGE_SCORES = ("hr", "ioa", "iop", "iou", "val_p", "new_p", "any_new", "new_share")
VARIED = ("hr", "ioa", "iop", "iou")  # those with a variance across users
HEADLINE = (
    "nll_per_token", "hr", "ioa", "iop", "iou", "path_iou", "cart_auc", "purchase_auc", "cart_log_loss",
    "purchase_log_loss",
)  # fmt: skip


class Measure(NamedTuple):
    """A figure's meaning; `better` is +1 where more is better, -1 where less is, 0 where neither."""

    words: str
    better: int


# The 20 metrics of the paper's composite (HeTLM, section 1.7.4), by part.
PAPER = {
    "outcome": (
        *(f"{label}_{kind}" for kind in ("accuracy", "recall", "precision") for label in (*OUTCOMES, "union")),
        "union_f1",
    ),
    "page": ("hr", "ioa", "iop", "iou", "new_p", "val_p"),
    "variance": tuple(f"{name}_var" for name in VARIED),
}


def _pages(prefix: str, what: str) -> dict[str, Measure]:
    sets = "pages count once"
    found = {
        "hr": Measure(f"hit rate: share of users with at least one page of {what} in the next session", 1),
        "ioa": Measure(f"share of the next session's pages that are in {what}; {sets}, mean over users", 1),
        "iop": Measure(f"share of the pages of {what} that the next session holds; {sets}, mean over users", 1),
        "iou": Measure(f"pages in both {what} and the next session, over pages in either; {sets}, mean over users", 1),
        "val_p": Measure(f"share of the pages of {what} that exist: 1 for a page vocabulary, 0 without pages", 1),
        "new_p": Measure(f"share of the distinct pages of {what} that the input does not hold, mean over users", 1),
        "any_new": Measure(f"share of users with a page of {what} that their input does not hold", 0),
        "new_share": Measure(f"share of the pages of {what}, repeats counted, that the input does not hold", 0),
    }
    found |= {
        f"{name}_var": Measure(f"variance of {name} across users, all users pooled (ddof 0)", -1) for name in VARIED
    }
    return {prefix + name: measure for name, measure in found.items()}


def _outcomes(prefix: str, how: str) -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for label, what in (("cart", "a cart"), ("purchase", "a purchase"), ("union", "a cart or a purchase")):
        found[f"{label}_accuracy"] = Measure(f"share of users for whom {what} was rightly predicted or not; {how}", 1)
        found[f"{label}_recall"] = Measure(f"share of the sessions with {what} that were predicted so; {how}", 1)
        found[f"{label}_precision"] = Measure(f"share of the predictions of {what} that came true; {how}", 1)
    found["union_f1"] = Measure(f"2PR / (P + R) of union_precision and union_recall; {how}", 1)
    found["acc_either"] = Measure(f"share of users with the cart right or the purchase right; {how}", 1)
    return {prefix + name: measure for name, measure in found.items()}


def _probabilities() -> dict[str, Measure]:
    found: dict[str, Measure] = {}
    for name in OUTCOMES:
        found[f"{name}_auc"] = Measure(f"area under the ROC curve of P({name}), ties count half", 1)
        found[f"{name}_average_precision"] = Measure(f"average precision of P({name})", 1)
        found[f"{name}_calibration_error"] = Measure(
            f"mean distance of P({name}) and the frequency of a {name}, 15 bins of equal mass, ties together", -1
        )
        found[f"{name}_log_loss"] = Measure(f"mean log loss of P({name}) in nats, clipped at 1e-7", -1)
    return found


def _worst(name: str, words: str, better: int) -> dict[str, Measure]:
    return {f"{name}_worst_decile": Measure(f"mean {words} of the tenth of users with the worst", better)}


MEASURES: dict[str, Measure] = {
    "nll_per_token": Measure("nats of the next session, [EOS] included, per token: all nats over all tokens", -1),
    **_pages("", "the expected set"),
    **_outcomes("", "predicted from the threshold on"),
    **_probabilities(),
    **_pages("path_", "the greedy path"),
    **_outcomes("path_", "predicted when the greedy path holds one of its pages"),
    "path_ioa_multiset": Measure("as path_ioa, a page counts as often as both hold it", 1),
    "path_iop_multiset": Measure("as path_iop, a page counts as often as both hold it", 1),
    "path_iou_multiset": Measure("as path_iou, a page counts as often as both hold it", 1),
    "path_bleu": Measure("corpus BLEU-4 over pages, one added to matches and n-grams for n > 1", 1),
    "path_bert_precision": Measure(
        "BERTScore precision with all-MiniLM-L6-v2, pages joined by ' - ', first 500 users", 1
    ),
    "path_bert_recall": Measure("BERTScore recall with all-MiniLM-L6-v2, first 500 users", 1),
    "path_bert_f1": Measure("BERTScore F1 with all-MiniLM-L6-v2, first 500 users", 1),
    **_worst("iou", "IoU of the expected set", 1),
    **_worst("path_iou", "IoU of the greedy path", 1),
    **_worst("nll_per_token", "nats per token (of each user)", -1),
    **_worst("cart_log_loss", "log loss of P(cart)", -1),
    **_worst("purchase_log_loss", "log loss of P(purchase)", -1),
}
