"""Every figure of a report once more, from predictions.parquet and report.json alone, in plain slow code."""

from collections import Counter
from math import exp, log
from statistics import fmean, pvariance
from typing import Any

from sklearn.metrics import average_precision_score, roc_auc_score

Row = dict[str, Any]


def figures(rows: list[Row], thresholds: tuple[float, float], marks: dict[str, list[str]]) -> dict[str, float | None]:
    """All but BERTScore; None where the predictor has no such figure. `marks`: pages of each outcome."""
    found: dict[str, float | None] = {}
    if any(row["expected"] for row in rows):
        found |= pages(rows, "expected", "")
    if any(row["path"] for row in rows):
        found |= pages(rows, "path", "path_")
        found |= multisets(rows)
        found["path_bleu"] = bleu(rows)
        if marks["cart"] and marks["purchase"]:
            said = [
                tuple(any(page in marks[name] for page in row["path"]) for name in ("cart", "purchase")) for row in rows
            ]
            found |= decisions(rows, said, "path_")
    said = [(row["cart_p"] >= thresholds[0], row["purchase_p"] >= thresholds[1]) for row in rows]
    found |= decisions(rows, said, "")
    for name in ("cart", "purchase"):
        found |= probabilities([row[f"{name}_p"] for row in rows], [row[name] for row in rows], name)
    if all(row["nll"] is not None for row in rows):
        found["nll_per_token"] = sum(row["nll"] for row in rows) / sum(row["tokens"] for row in rows)
        found["nll_per_token_worst_decile"] = worst([row["nll"] / row["tokens"] for row in rows], highest=True)
    return found


def pages(rows: list[Row], column: str, prefix: str) -> dict[str, float | None]:
    users: dict[str, list[float]] = {
        name: [] for name in ("hr", "ioa", "iop", "iou", "val_p", "new_p", "any_new", "new_share")
    }
    for row in rows:
        came, said = set(row["target"]), set(row[column])
        seen = {page for session in row["input"] for page in session}
        users["hr"].append(1.0 if came & said else 0.0)
        users["ioa"].append(len(came & said) / len(came))
        users["iop"].append(len(came & said) / len(said) if said else 0.0)
        users["iou"].append(len(came & said) / len(came | said))
        users["val_p"].append(1.0 if said else 0.0)
        users["new_p"].append(len(said - seen) / len(said) if said else 0.0)
        users["any_new"].append(1.0 if said - seen else 0.0)
        new = [page for page in row[column] if page not in seen]
        users["new_share"].append(len(new) / len(row[column]) if said else 0.0)
    found: dict[str, float | None] = {prefix + name: fmean(values) for name, values in users.items()}
    found |= {f"{prefix}{name}_var": pvariance(users[name]) for name in ("hr", "ioa", "iop", "iou")}
    found[f"{prefix}iou_worst_decile"] = worst(users["iou"], highest=False)
    return found


def multisets(rows: list[Row]) -> dict[str, float | None]:
    ioa, iop, iou = [], [], []
    for row in rows:
        hits = (Counter(row["target"]) & Counter(row["path"])).total()
        ioa.append(hits / len(row["target"]))
        iop.append(hits / len(row["path"]) if row["path"] else 0.0)
        iou.append(hits / (len(row["target"]) + len(row["path"]) - hits))
    return {"path_ioa_multiset": fmean(ioa), "path_iop_multiset": fmean(iop), "path_iou_multiset": fmean(iou)}


def bleu(rows: list[Row]) -> float:
    logs, came, said = [], sum(len(row["target"]) for row in rows), sum(len(row["path"]) for row in rows)
    for n in range(1, 5):
        matches = total = 0
        for row in rows:
            left = [tuple(row["target"][i : i + n]) for i in range(len(row["target"]) - n + 1)]
            for gram in (tuple(row["path"][i : i + n]) for i in range(len(row["path"]) - n + 1)):
                total += 1
                if gram in left:
                    left.remove(gram)
                    matches += 1
        if n == 1 and matches == 0:
            return 0.0
        logs.append(log(matches / total) if n == 1 else log((matches + 1) / (total + 1)))
    return min(1.0, exp(1 - came / said)) * exp(fmean(logs))


def decisions(rows: list[Row], said: list[Any], prefix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    truth = [(row["cart"], row["purchase"]) for row in rows]
    labels: dict[str, tuple[list[bool], list[bool]]] = {
        "cart": ([t[0] for t in truth], [s[0] for s in said]),
        "purchase": ([t[1] for t in truth], [s[1] for s in said]),
        "union": ([t[0] or t[1] for t in truth], [s[0] or s[1] for s in said]),
    }
    for name, (came, predicted) in labels.items():
        hits = sum(c and p for c, p in zip(came, predicted, strict=True))
        recall = hits / sum(came) if sum(came) else 0.0
        precision = hits / sum(predicted) if sum(predicted) else 0.0
        found[f"{prefix}{name}_accuracy"] = fmean(c == p for c, p in zip(came, predicted, strict=True))
        found[f"{prefix}{name}_recall"], found[f"{prefix}{name}_precision"] = recall, precision
    found[f"{prefix}union_f1"] = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    found[f"{prefix}acc_either"] = fmean(t[0] == s[0] or t[1] == s[1] for t, s in zip(truth, said, strict=True))
    return found


def probabilities(p: list[float], came: list[bool], name: str) -> dict[str, float | None]:
    losses = [-log(max(q if c else 1 - q, 1e-7)) for q, c in zip(p, came, strict=True)]
    found: dict[str, float | None] = {
        f"{name}_log_loss": fmean(losses),
        f"{name}_log_loss_worst_decile": worst(losses, highest=True),
        f"{name}_calibration_error": calibration_error(p, came),
        f"{name}_auc": None,
        f"{name}_average_precision": None,
    }
    if any(came):
        found[f"{name}_average_precision"] = average_precision_score(came, p)
        if not all(came):
            found[f"{name}_auc"] = roc_auc_score(came, p)
    return found


def calibration_error(p: list[float], came: list[bool]) -> float:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for q, c in zip(p, came, strict=True):
        middle = sum(other < q for other in p) + p.count(q) / 2
        bins.setdefault(min(int(15 * middle / len(p)), 14), []).append((q, c))
    return sum(abs(sum(c for _, c in cases) - sum(q for q, _ in cases)) for cases in bins.values()) / len(p)


def worst(values: list[float], highest: bool) -> float:
    count = max(len(values) // 10, 1)
    return fmean(sorted(values, reverse=highest)[:count])
