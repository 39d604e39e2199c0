"""Seed events for retrieval: those of the closed session, and items that the table they were made by did not know."""

from dataclasses import dataclass

from models.catalogue import Catalogue
from models.visit import Interest


@dataclass(frozen=True)
class Seeding:
    """As the live channels are kept: at most `most` seeds, a weight falls to `gamma` with each event."""

    gamma: float = 0.923
    most: int = 5
    recency: bool = False  # each item is a channel of its own

    def seeds(self, interest: Interest, catalogue: Catalogue) -> list[str]:
        """Items, heaviest first.

        Sessions are cut with the table alone, so that replaying them gives the same; an item that is newer than the
        table finds its channel here, by its vector. It represents the channel if it is the newest there. Where none of
        the session's seeds is known, as after another bundle, the newest items take their place.
        """
        ages = {item_id: age for age, item_id in enumerate(interest.recent)}
        channels: dict[int | str, tuple[float, str]] = {}
        for item_id, cluster, weight in interest.seeds:
            if catalogue.row(item_id) is not None:
                channels[item_id if self.recency else cluster] = weight, item_id
        anew = not channels
        for item_id, age in reversed(ages.items()):
            row = catalogue.row(item_id)
            if row is None or not catalogue.has_vector(row) or not (anew or catalogue.is_new(row)):
                continue
            place = item_id if self.recency else catalogue.cluster(row)
            weight, before = channels.get(place, (0.0, item_id))
            newest = item_id if age <= ages.get(before, age) else before
            channels[place] = weight + self.gamma**age, newest
        ranked = sorted(channels.values(), key=lambda one: -one[0])
        return [item_id for _, item_id in ranked[: self.most]]
