"""Seed events for retrieval: those of the closed session, and items that the table they were made by did not know."""

from models.catalogue import Catalogue
from models.items import SeedRule
from models.visit import Interest


def seeds_of(interest: Interest, catalogue: Catalogue, rule: SeedRule) -> list[str]:
    """Items that have a vector, heaviest first, by the rule that the retriever was trained with."""
    if rule.policy == "channels":
        return _of_channels(interest, catalogue, rule)
    older = (item_id for item_id, _, _ in interest.seeds)
    newest = dict.fromkeys((*interest.recent, *older))
    return [item_id for item_id in newest if _row(item_id, catalogue) is not None][: rule.most]


def _of_channels(interest: Interest, catalogue: Catalogue, rule: SeedRule) -> list[str]:
    """Sessions are cut with the table alone, so that replaying them gives the same; an item that is newer than the
    table finds its channel here, by its vector. It represents the channel if it is the newest there. Where none of the
    session's seeds is known, as after another bundle, the newest items take their place.
    """
    ages = {item_id: age for age, item_id in enumerate(interest.recent)}
    channels: dict[int, tuple[float, str]] = {}
    for item_id, cluster, weight in interest.seeds:
        if _row(item_id, catalogue) is not None:
            heavier, newest = channels.get(cluster, (0.0, item_id))  # where sessions were cut with other seeds
            channels[cluster] = heavier + weight, newest
    anew, touched = not channels, None
    for item_id, age in reversed(ages.items()):
        row = _row(item_id, catalogue)
        if row is None:
            continue
        touched = catalogue.cluster(row)
        if anew or catalogue.is_new(row):
            weight, before = channels.get(touched, (0.0, item_id))
            newest = item_id if age <= ages.get(before, age) else before
            channels[touched] = weight + rule.gamma**age, newest
    kept = sorted(channels, key=lambda place: -channels[place][0])[: rule.most]
    if rule.protect and touched in channels and touched not in kept:
        kept[-1] = touched
    return [channels[place][1] for place in kept]


def _row(item_id: str, catalogue: Catalogue) -> int | None:
    """The row of an item that has a vector."""
    row = catalogue.row(item_id)
    return row if row is not None and catalogue.has_vector(row) else None
