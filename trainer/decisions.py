"""What happens to models: published, refused, promoted, retired, rolled back, pruned; each with reason and evidence.

Every function writes by one compare-and-set. Those that follow from a pair of models in service (`seen`) write nothing
and return nothing when another pair is in service by then. `by` is trainer, judge or user.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.manifest import BundleRefused
from models.references import ModelRef
from streams.wire import CHALLENGER, CHAMPION, ModelDecision
from trainer.errors import TrainingError
from trainer.registry import Aliases, Registry, Story

PUBLISHED, REFUSED, PROMOTED, RETIRED = "published", "refused", "promoted", "retired"
ROLLED_BACK, PRUNED = "rolled_back", "pruned"
HALF_DONE_S = 24 * 3600.0  # no publication takes so long


class InService(NamedTuple):
    """Digests of the bundles that the aliases name."""

    champion: str | None
    challenger: str | None


class Grounds(NamedTuple):
    """Why something is decided, and by whom."""

    by: str
    reason: str
    evidence: Mapping[str, Any]


def by_hand(reason: str) -> Grounds:
    """What a person decides at the command line."""
    return Grounds("user", reason, {})


def in_service(story: Story) -> InService:
    """The pair that the story ends with."""
    named = {alias: record.digest for alias, record in story.aliases.items()}
    return InService(named.get(CHAMPION), named.get(CHALLENGER))


def champions(story: Story) -> list[str]:
    """Digests of all champions, the present one last; those that were rolled back are not among them."""
    line: list[str] = []
    for decision in story.decisions:
        named = decision.aliases.get(CHAMPION)
        if decision.decision == ROLLED_BACK and named in line:
            while line[-1] != named:
                line.pop()
        elif named is not None:
            line.append(named)
    return line


def publish(registry: Registry, aliases: Aliases, bundle: Path, grounds: Grounds) -> ModelRef:
    """Publish a bundle as the challenger, in the place of the one before; as the champion where there is none.

    The champion itself, published again, stays what it is. Raises BundleRefused for what cannot be used.
    """
    ref = registry.publish(bundle)

    def decide(story: Story) -> list[ModelDecision]:
        seen = in_service(story)
        if seen.champion is None:
            return [_decision(PUBLISHED, ref, grounds, {CHAMPION: ref.digest})]
        if ref.digest in seen:
            return []
        return [*_replaced(story, ref, grounds.by), _decision(PUBLISHED, ref, grounds, {CHALLENGER: ref.digest})]

    aliases.change(decide)
    return ref


def refuse(aliases: Aliases, candidate: ModelRef, grounds: Grounds) -> Sequence[ModelDecision]:
    """Tell of a candidate that was not good enough; no alias moves."""
    return aliases.change(lambda story: [_decision(REFUSED, candidate, grounds, {})])


def promote(
    registry: Registry, aliases: Aliases, name: str | None, seen: InService, grounds: Grounds
) -> Sequence[ModelDecision]:
    """Make a published bundle the champion, after a check of all of it; `name`: how its version or digest begins.

    It need not be the challenger. Raises BundleRefused, and TrainingError when there is no such bundle.
    """
    if name is None:
        raise TrainingError("there is no challenger. Name the version that becomes champion: browsecast models list")
    ref = registry.find(name)
    if ref.digest == seen.champion:
        raise TrainingError(f"{ref.version} is the champion already")
    registry.verify(ref)
    moves = {CHAMPION: ref.digest} | ({CHALLENGER: None} if seen.challenger == ref.digest else {})

    def decide(story: Story) -> list[ModelDecision]:
        if in_service(story) != seen or _is_pruned(story, ref.digest):
            return []
        return [_decision(PROMOTED, ref, grounds, moves)]

    return aliases.change(decide)


def retire(aliases: Aliases, seen: InService, grounds: Grounds) -> Sequence[ModelDecision]:
    """Take the challenger out of service."""

    def decide(story: Story) -> list[ModelDecision]:
        if in_service(story) != seen or seen.challenger is None:
            return []
        return [_decision(RETIRED, _named(story, CHALLENGER), grounds, {CHALLENGER: None})]

    return aliases.change(decide)


def roll_back(registry: Registry, aliases: Aliases, seen: InService, grounds: Grounds) -> Sequence[ModelDecision]:
    """Take the champion out of service; the newest champion before it that is still whole comes back.

    Raises TrainingError when there is none: then nothing changes.
    """
    before, passed_over = _last_whole(registry, [one for one in champions(aliases.story()) if one != seen.champion])
    found = grounds._replace(evidence={**grounds.evidence, **passed_over})
    moves = {CHAMPION: before.digest} | ({CHALLENGER: None} if seen.challenger == before.digest else {})

    def decide(story: Story) -> list[ModelDecision]:
        if in_service(story) != seen or seen.champion is None or _is_pruned(story, before.digest):
            return []
        return [_decision(ROLLED_BACK, _named(story, CHAMPION), found, moves)]

    return aliases.change(decide)


def prune(registry: Registry, aliases: Aliases, keep: int, grounds: Grounds) -> list[ModelRef]:
    """Remove all bundles but those that an alias names and the last `keep` champions before; returns the removed ones.

    A bundle that the story does not know yet is left alone; what was left half published a day ago goes, too.
    """
    published = registry.bundles()

    def decide(story: Story) -> list[ModelDecision]:
        kept = _kept(story, keep)
        known = {decision.digest for decision in story.decisions}
        unwanted = [ref for ref in published if ref.digest in known - kept and not _is_pruned(story, ref.digest)]
        return [_decision(PRUNED, ref, grounds, {}) for ref in unwanted]

    aliases.change(decide)  # first the story, then the files: nobody promotes what is about to go
    story = aliases.story()
    gone = [ref for ref in published if _is_pruned(story, ref.digest)]
    for ref in gone:
        registry.remove(ref)
    registry.sweep(HALF_DONE_S, {alias.digest for alias in story.aliases.values()})
    return gone


def verify_all(
    registry: Registry, aliases: Aliases, name: str | None
) -> Iterator[tuple[ModelRef, BundleRefused | None]]:
    """Check one bundle, or all of the registry and all that an alias names; each with why it is refused, if it is."""
    if name is None:
        story = aliases.story()
        named = {alias.digest: _named(story, key) for key, alias in story.aliases.items()}
        refs = list((named | {ref.digest: ref for ref in registry.bundles()}).values())
    else:
        refs = [registry.find(name)]
    for ref in refs:
        try:
            registry.verify(ref)
        except BundleRefused as error:
            yield ref, error
        else:
            yield ref, None


def _decision(kind: str, ref: ModelRef, grounds: Grounds, moves: Mapping[str, str | None]) -> ModelDecision:
    now_ms = time.time_ns() // 1_000_000
    return ModelDecision(
        uuid.uuid4().hex, now_ms, kind, ref.version, ref.digest, ref.uri, grounds.reason, grounds.by,
        dict(grounds.evidence), dict(moves),
    )  # fmt: skip


def _named(story: Story, alias: str) -> ModelRef:
    named = story.aliases[alias]
    return ModelRef(named.version, named.digest, named.uri, 0)


def _replaced(story: Story, successor: ModelRef, by: str) -> list[ModelDecision]:
    """The challenger before, if there is one, retires."""
    if CHALLENGER not in story.aliases:
        return []
    grounds = Grounds(by, "a newer challenger takes its place", {"successor": successor.digest})
    return [_decision(RETIRED, _named(story, CHALLENGER), grounds, {CHALLENGER: None})]


def _is_pruned(story: Story, digest: str) -> bool:
    fates = [decision.decision for decision in story.decisions if decision.digest == digest]
    return fates[-1:] == [PRUNED]


def _kept(story: Story, keep: int) -> set[str]:
    """Digests that no pruning touches."""
    former = [digest for digest in dict.fromkeys(reversed(champions(story))) if digest != in_service(story).champion]
    return {digest for digest in in_service(story) if digest is not None} | set(former[:keep])


def _last_whole(registry: Registry, digests: Sequence[str]) -> tuple[ModelRef, dict[str, Any]]:
    """The last of the bundles that is there and whole, and, as evidence, why those behind it are not."""
    published = {ref.digest: ref for ref in registry.bundles()}
    reasons: dict[str, str] = {}
    for digest in reversed(digests):
        if digest not in published:
            reasons[digest] = f"{digest} is gone from registry {registry.address}"
            continue
        try:
            registry.verify(published[digest])
        except BundleRefused as error:
            reasons[digest] = str(error)
        else:
            return published[digest], {"passed_over": reasons} if reasons else {}
    why = "; ".join(reasons.values()) or "there was none"
    raise TrainingError(f"no champion before this one can come back ({why}). Publish or promote another bundle")
