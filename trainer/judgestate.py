"""What the judge knows, in one file that is replaced in one step."""

import os
from pathlib import Path

import msgspec

from streams.wire import Score
from trainer.decisions import InService
from trainer.drift import Windows
from trainer.errors import TrainingError
from trainer.reign import Reign
from trainer.trial import Rules, Trial
from trainer.visitors import pseudonym

FORMAT = 1


class JudgeState(msgspec.Struct):
    """Positions in the scores, and the evidence that was read up to them.

    Evidence is kept by the digests that the scores name, whatever the aliases name at that time, so it does not depend
    on when somebody looked at the aliases. A trial's key is the champion's digest, a blank and the challenger's.
    """

    topic: str
    positions: dict[int, int] = {}
    trials: dict[str, Trial] = {}
    reigns: dict[str, Reign] = {}  # by champion
    windows: dict[str, Windows] = {}  # by champion
    format: int = FORMAT

    def add(self, score: Score, rules: Rules) -> None:
        """Take in one score; those of workers that did not name the model's digest yet say nothing."""
        champion, shadow = score.model_digest, score.shadow
        if champion is None:
            return
        self.reigns.setdefault(champion, Reign()).add(score, rules)
        self.windows.setdefault(champion, Windows()).add(score)
        if shadow is not None:
            self.trials.setdefault(f"{champion} {shadow.model_digest}", Trial()).add(score, shadow, rules)

    def trial(self, seen: InService) -> Trial | None:
        """The trial of this pair, once a score has come of it."""
        return self.trials.get(f"{seen.champion} {seen.challenger}")

    def keep(self, seen: InService) -> bool:
        """Only what is about this pair: one that comes back begins anew. Says whether there was anything else."""
        pair = f"{seen.champion} {seen.challenger}"
        before = len(self.trials) + len(self.reigns) + len(self.windows)
        self.trials = {key: trial for key, trial in self.trials.items() if key == pair}
        self.reigns = {key: reign for key, reign in self.reigns.items() if key == seen.champion}
        self.windows = {key: windows for key, windows in self.windows.items() if key == seen.champion}
        return len(self.trials) + len(self.reigns) + len(self.windows) < before

    def forget(self, user_id: str) -> None:
        """Nothing stays of a user but a share in sums."""
        visitor = pseudonym(user_id)
        for trial in self.trials.values():
            trial.visitors.pop(visitor, None)
        for windows in self.windows.values():
            windows.forget(visitor)


def load_state(path: Path, topic: str) -> JudgeState:
    """What was saved; nothing known where no file is. Raises TrainingError for a file of something else."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return JudgeState(topic)
    try:
        state = msgspec.json.decode(content, type=JudgeState)
    except msgspec.MsgspecError as error:
        raise _refused(path, f"cannot be read ({error})") from None
    if state.format != FORMAT or state.topic != topic:
        what = f"is of topic {state.topic!r}, format {state.format}; this judge reads {topic!r}, format {FORMAT}"
        raise _refused(path, what)
    return state


def save_state(path: Path, state: JudgeState) -> None:
    """Replace the file in one step; after a crash of the machine it is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coming = path.with_name(path.name + ".coming")
    with coming.open("wb") as file:
        file.write(msgspec.json.encode(state))
        file.flush()
        os.fsync(file.fileno())
    coming.replace(path)


def _refused(path: Path, what: str) -> TrainingError:
    return TrainingError(
        f"the judge's state {path} {what}. Move it away: the judge then reads the scores again from the beginning, and "
        "the evidence of the present models is gathered anew"
    )
