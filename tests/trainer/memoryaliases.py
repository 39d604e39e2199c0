"""The aliases without a broker: what is decided is in the story at once."""

from collections.abc import Callable, Sequence

import msgspec

from streams.aliases import Story
from streams.wire import ModelDecision


class MemoryAliases:
    """`before_change` is called before each change reads the story: another trainer, where a test wants one."""

    def __init__(self) -> None:
        self.told = Story()
        self.before_change: Callable[[], None] = lambda: None

    def story(self) -> Story:
        return Story(dict(self.told.aliases), list(self.told.decisions))

    def change(self, decide: Callable[[Story], Sequence[ModelDecision]]) -> Sequence[ModelDecision]:
        self.before_change()
        decisions = decide(self.story())
        for key, record in self.told.records(decisions).items():
            self.told.take(key.encode(), None if record is None else msgspec.json.encode(record))
        return decisions
