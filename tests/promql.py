"""The few words of PromQL that our alert rules on the trainer are written in, on what /metrics shows.

    absent(X)                     increase(SELECTOR[15m]) OP number
    sum(SELECTOR) OP number       SELECTOR OP number        SELECTOR OP SELECTOR, matched by all labels

Anything else is an error, so no rule is believed to be tested that is not.
"""

import operator
import re
from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Labels = frozenset[tuple[str, str]]
Vector = dict[Labels, float]
Samples = Mapping[str, Vector]  # by name

COMPARE = {">": operator.gt, "<": operator.lt, "==": operator.eq}
SELECTOR = r"[a-z_]+(?:\{[^}]*\})?"


def scraped(page: bytes) -> dict[str, Vector]:
    """Every sample of a page of /metrics, by its name."""
    found: dict[str, Vector] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def fires(expression: str, before: Samples, now: Samples) -> list[dict[str, str]]:
    """The labels of each alert that a rule raises; `before` is what was scraped at the begin of the rule's range."""
    return [dict(labels) for labels in _vector(" ".join(expression.split()), before, now)]


def _vector(expression: str, before: Samples, now: Samples) -> Vector:
    if inner := re.fullmatch(r"absent\((.+)\)", expression):
        return {} if _vector(inner[1], before, now) else {frozenset(): 1.0}
    parts = re.fullmatch(rf"(.+?) (>|<|==) ({SELECTOR}|[0-9.]+)", expression)
    if parts is None:
        raise ValueError(f"not among the words of PromQL that are known here: {expression}")
    left, compare = _side(parts[1], before, now), COMPARE[parts[2]]
    if re.fullmatch(r"[0-9.]+", parts[3]):
        return {labels: value for labels, value in left.items() if compare(value, float(parts[3]))}
    right = _select(parts[3], now)
    return {labels: value for labels, value in left.items() if labels in right and compare(value, right[labels])}


def _side(expression: str, before: Samples, now: Samples) -> Vector:
    if increase := re.fullmatch(rf"increase\(({SELECTOR})\[\d+[mh]\]\)", expression):
        old = _select(increase[1], before)  # a series that was not there before shows no increase: so does Prometheus
        return {labels: value - old[labels] for labels, value in _select(increase[1], now).items() if labels in old}
    if total := re.fullmatch(rf"sum\(({SELECTOR})\)", expression):
        values = _select(total[1], now).values()
        return {frozenset(): sum(values)} if values else {}
    return _select(expression, now)


def _select(selector: str, samples: Samples) -> Vector:
    name, _, labels = selector.partition("{")
    wanted = set(re.findall(r'(\w+)="([^"]*)"', labels))
    if not re.fullmatch(SELECTOR, selector) or labels.count("=") != len(wanted):
        raise ValueError(f"not a selector that is known here: {selector}")
    return {found: value for found, value in samples.get(name, {}).items() if wanted <= found}
