"""The judge: what it decides, that it decides the same whatever dies, and how often it errs."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from streams import wire
from streams.guesses import BASELINES as SCORED
from tests.trainer.refreshing import MemoryAliases
from tests.trainer.scorelog import CHALLENGER, CHAMPION, OLD, OTHER, Names, Played, records, score, scores
from trainer import judge as judging
from trainer.errors import TrainingError
from trainer.judge import Judge
from trainer.judgestate import JudgeState, load_state, save_state
from trainer.reign import BASELINES, Reign
from trainer.sequential import log_e
from trainer.trainermetrics import TrainerMetrics
from trainer.trial import Rules, Trial


def named(*champions: str, challenger: str | None = None) -> MemoryAliases:
    """A story of champions, one promoted after the other, and a challenger."""
    aliases = MemoryAliases()
    for i, digest in enumerate(champions):
        moves: dict[str, str | None] = {"champion": digest}
        place = (digest[7:11], digest, f"memory://{digest[7:11]}")
        aliases.told.decisions.append(wire.ModelDecision(f"d{i}", i, "promoted", *place, "", "user", {}, moves))
        aliases.told.aliases["champion"] = wire.ModelAlias("champion", *place)
    if challenger is not None:
        aliases.told.aliases["challenger"] = wire.ModelAlias("challenger", "v", challenger, "memory://v")
    return aliases


class Court:
    """A judge's directory, and all that it judges by."""

    def __init__(self, tmp_path: Path, aliases: MemoryAliases, **rules: Any) -> None:
        self.path, self.aliases = tmp_path / "judge.json", aliases
        self.registry, self.metrics = Names([OLD, CHAMPION, CHALLENGER, OTHER]), TrainerMetrics()
        self.rules = Rules(**rules)

    def judge(self, log: Sequence[wire.Record], at_a_time: int = 100) -> Judge:
        """Judge up to the log's end; returns the judge."""
        judge = Judge(self.path, Played(log, at_a_time), self.aliases, self.registry, self.metrics, self.rules)
        judge.catch_up()
        return judge

    def last(self) -> wire.ModelDecision:
        """The judge's last decision."""
        decision = self.aliases.told.decisions[-1]
        assert decision.by == "judge"
        return decision

    def aliases_now(self) -> dict[str, str]:
        """Alias -> digest."""
        return {alias: record.digest for alias, record in self.aliases.told.aliases.items()}

    def figure(self, name: str, **labels: str) -> float | None:
        """A metric's value."""
        return self.metrics.registry.get_sample_value(f"browsecast_{name}", labels)


@pytest.fixture
def court(tmp_path: Path) -> Court:
    """A champion that followed an old one, and a challenger."""
    return Court(tmp_path, named(OLD, CHAMPION, challenger=CHALLENGER))


def test_a_better_challenger_is_promoted_with_its_evidence(court: Court) -> None:
    made = scores(1_500, better=0.08)
    court.judge(records(made))
    decision = court.last()
    assert (decision.decision, decision.digest) == ("promoted", CHALLENGER)
    assert court.aliases_now() == {"champion": CHALLENGER}
    evidence = decision.evidence
    used = made[: evidence["sessions"]]  # no visitor comes often enough to be left out
    pairs = [(one.iou, one.shadow.iou) for one in used if one.shadow is not None]
    assert 50 < len(used) < len(made)
    assert evidence["iou"]["champion"] == pytest.approx(np.mean([a for a, _ in pairs]))
    assert evidence["iou"]["challenger"] == pytest.approx(np.mean([b for _, b in pairs]))
    assert evidence["iou"]["low"] < evidence["iou"]["difference"] < evidence["iou"]["high"]
    brier = [(one.cart_p - one.cart) ** 2 for one in used]
    assert evidence["cart_brier"]["champion"] == pytest.approx(np.mean(brier))
    assert evidence["visitors"] == len({one.user_id for one in used})
    bar = math.log(1 / court.rules.alpha)
    assert all(evidence["log_e"][claim] >= bar for claim in ("iou higher", "cart harmless", "purchase harmless"))
    assert court.figure("decisions_total", decision="promoted") == 1


def test_a_worse_challenger_is_retired(court: Court) -> None:
    court.judge(records(scores(1_000, better=-0.08)))
    assert (court.last().decision, court.last().reason) == ("retired", "its IoU is lower than the champion's")
    assert court.aliases_now() == {"champion": CHAMPION}


def test_a_challenger_that_harms_an_outcome_is_retired_however_good_its_pages_are(court: Court) -> None:
    court.judge(records(scores(1_500, better=0.1, sharper=-0.15)))
    assert (court.last().decision, court.last().reason) == (
        "retired",
        "its Brier score of the cart is worse by over 0.01",
    )


def test_a_challenger_that_shows_nothing_is_retired_in_the_end(tmp_path: Path) -> None:
    court = Court(tmp_path, named(CHAMPION, challenger=CHALLENGER), most_sessions=400)
    court.judge(records(scores(399)))
    assert court.aliases_now() == {"champion": CHAMPION, "challenger": CHALLENGER}
    court.judge(records(scores(410)))
    assert court.last().evidence["sessions"] == 400
    assert court.last().reason == "400 sessions have not shown that it is better and harmless"


def test_only_the_named_pair_counts_and_a_new_one_begins_with_nothing(court: Court) -> None:
    old = scores(300, better=0.05)
    others = [one for one in scores(50, better=0.5, seed=1, model_digest=OTHER)]
    court.judge(records([*old, *others]))
    assert court.figure("challenger_sessions") == 300
    court.aliases.told.aliases["challenger"].digest = OTHER  # a newer one takes its place
    court.judge(records([*old, *others]))
    assert court.figure("challenger_sessions") == 0
    court.aliases.told.aliases["challenger"].digest = CHALLENGER
    judge = court.judge(records([*old, *others, *old[:10]]))
    assert court.figure("challenger_sessions") == 10
    court.aliases.told.aliases["champion"].digest = OTHER  # a user promotes another by hand
    judge.settle()
    assert court.figure("challenger_sessions") == 0
    assert not any(one.by == "judge" for one in court.aliases.told.decisions)


def test_a_verdict_on_a_pair_that_is_no_more_moves_nothing(court: Court) -> None:
    def another(told: Any) -> None:
        told.aliases["challenger"].digest = OTHER

    court.aliases.before = another
    court.judge(records(scores(1_500, better=0.08)))
    assert court.aliases_now() == {"champion": CHAMPION, "challenger": OTHER}
    assert not any(one.by == "judge" for one in court.aliases.told.decisions)


def test_fallbacks_and_visitors_who_come_too_often_are_left_out_and_counted(court: Court) -> None:
    often = [score((0.5, 0.1, 0.1), (0.5, 0.1, 0.1), "heavy") for _ in range(25)]
    fallen_back = [score((0.1, 0.1, 0.1), (0.9, 0.1, 0.1), f"u{i}", fallback="timeout") for i in range(7)]
    no_shadow = [score((0.1, 0.1, 0.1), user=f"v{i}") for i in range(3)]
    court.judge(records([*often, *fallen_back, *no_shadow]))
    (trial,) = load_state(court.path, "scores").trials.values()
    assert trial.iou.sums.count == 20
    assert sorted(trial.left_out.values()) == [5, 7]


def test_a_forgotten_user_leaves_the_state(court: Court) -> None:
    one = score((0.5, 0.1, 0.1), (0.5, 0.1, 0.1), "ann", cluster=1)
    court.judge(records([one]))
    known = court.path.read_bytes()
    court.judge(records([one, None], partitions=1, key="ann"))
    state = load_state(court.path, "scores")
    (trial,), (windows,) = state.trials.values(), state.windows.values()
    assert (trial.visitors, windows.filling.clusters, trial.iou.sums.count) == ({}, {}, 1)
    assert len(court.path.read_bytes()) < len(known)


def test_a_champion_below_the_best_baseline_gives_way_to_the_one_before(court: Court) -> None:
    court.aliases.told.aliases.pop("challenger")
    court.judge(records(scores(2_000, baseline=0.1)))
    decision = court.last()
    assert (decision.decision, decision.digest) == ("rolled_back", CHAMPION)
    assert court.aliases_now() == {"champion": OLD}
    assert decision.evidence["baselines"]["own_frequencies"]["iou"] > decision.evidence["iou"]
    assert court.figure("decisions_total", decision="rolled_back") == 1
    court.judge(records(scores(2_000, baseline=0.1)))  # nothing new: the one before is not blamed for it
    assert court.aliases_now() == {"champion": OLD}
    assert court.figure("champion_below_baseline") == 0


def test_a_fallen_champion_without_one_before_it_raises_the_alert_and_stays(tmp_path: Path) -> None:
    court = Court(tmp_path, named(CHAMPION))
    court.judge(records(scores(300)))
    assert court.figure("champion_below_baseline") == 0
    court.judge(records(scores(2_000, baseline=0.1)))
    assert court.aliases_now() == {"champion": CHAMPION}
    assert court.figure("champion_below_baseline") == 1
    assert court.figure("decisions_total", decision="rolled_back") == 0


def test_a_fallen_champion_that_nobody_can_replace_still_gives_way_to_a_challenger_that_wins(tmp_path: Path) -> None:
    court = Court(tmp_path, named(CHAMPION, challenger=CHALLENGER))
    fallen, won = scores(400, baseline=0.3), scores(1_500, better=0.08, seed=1)
    alone = [msgspec.structs.replace(one, shadow=None) for one in fallen]
    judge = court.judge(records(alone))
    assert court.figure("champion_below_baseline") == 1
    assert court.aliases_now() == {"champion": CHAMPION, "challenger": CHALLENGER}
    judge.settle()  # it is not tried again and again
    log = records([*alone, *won])
    judge._feed = Played(log)
    judge.catch_up()
    assert court.last().decision == "promoted" and court.aliases_now() == {"champion": CHALLENGER}


def test_a_winner_that_cannot_serve_any_more_is_retired(court: Court) -> None:
    court.registry.damaged.add(CHALLENGER)
    court.judge(records(scores(1_500, better=0.08)))
    assert court.last().decision == "retired"
    assert "do not match the manifest's digest" in court.last().reason
    assert court.aliases_now() == {"champion": CHAMPION}


def test_a_score_that_cannot_be_read_is_passed_over(court: Court) -> None:
    log = records(scores(20))
    log[3] = log[3]._replace(value=b"{}")
    court.judge(log)
    assert court.figure("judged_scores_total") == 19
    assert court.figure("challenger_sessions") == 19


class Killed(Exception):
    """The process dies here."""


def dies(at: int, step: str) -> Callable[[pytest.MonkeyPatch, Court], None]:
    """Die at the n-th save, before or after it, or when a decision is written but nobody has noted it."""
    count = 0

    def arm(patch: pytest.MonkeyPatch, court: Court) -> None:
        if step == "decided":
            change = court.aliases.change

            def change_and_die(decide: Any) -> None:
                change(decide)
                patch.undo()
                raise Killed

            patch.setattr(court.aliases, "change", change_and_die)
            return

        def save(path: Path, state: JudgeState) -> None:
            nonlocal count
            count += 1
            if count == at and step == "before":
                raise Killed
            save_state(path, state)
            if count == at:
                raise Killed

        patch.setattr(judging, "save_state", save)

    return arm


@pytest.mark.parametrize("step", ["before", "after", "decided"])
@pytest.mark.parametrize("at", [1, 4, 9])
def test_a_judge_that_was_killed_decides_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, step: str
) -> None:
    log = records(scores(1_500, better=0.08))
    calm = Court(tmp_path / "calm", named(OLD, CHAMPION, challenger=CHALLENGER))
    calm.judge(log)
    court = Court(tmp_path / "killed", named(OLD, CHAMPION, challenger=CHALLENGER))
    dies(at, step)(monkeypatch, court)
    with pytest.raises(Killed):
        court.judge(log, at_a_time=100)
    monkeypatch.undo()
    court.judge(log, at_a_time=37)  # and whatever a batch holds
    assert [one.by for one in court.aliases.told.decisions].count("judge") == 1
    assert court.last().evidence == calm.last().evidence
    assert court.last().evidence["sessions"] > 100
    assert load_state(court.path, "scores").positions == load_state(calm.path, "scores").positions


def test_a_state_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    save_state(path, JudgeState("shop1.scores"))
    with pytest.raises(TrainingError, match=r"topic 'shop1\.scores'"):
        load_state(path, "scores")
    path.write_bytes(b'{"positions": 1}')
    with pytest.raises(TrainingError, match="Move it away"):
        load_state(path, "shop1.scores")


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"brier_margin": 1.0}, {"most_sessions": 0}])
def test_rules_that_cannot_work_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(wrong))):
        Rules(**wrong)


def test_the_baselines_are_those_that_are_scored() -> None:
    assert set(BASELINES) == set(SCORED)


def verdicts(runs: int, sessions: int, **ways: Any) -> list[str | None]:
    """What becomes of the challenger in each of many runs, a look after every session."""
    found: list[str | None] = []
    for seed in range(runs):
        trial, rules = Trial(), Rules()
        for one in scores(sessions, seed=seed, **ways):
            assert one.shadow is not None
            trial.add(one, one.shadow, rules)
        found.append(None if trial.verdict is None else trial.verdict.decision)
    return found


def test_a_challenger_that_is_no_better_is_promoted_in_less_than_alpha_of_the_runs() -> None:
    assert verdicts(200, 300).count("promoted") <= 10  # 5 % of 200; measured: 0


def test_a_challenger_that_is_better_and_harmless_is_not_retired_for_harm() -> None:
    found = verdicts(12, 1_400, better=0.06)
    assert found.count("retired") == 0
    assert found.count("promoted") >= 10  # most of these sessions go into showing that no outcome suffers


def test_visitors_who_come_often_do_not_decide_alone() -> None:
    """Visitors have likings of their own, drawn around 0, and some of them come a hundred times.

    What these few like says little of all others. Where every session counts, a fifth of the runs and more promote a
    challenger that visitors at large like no better; with at most 20 sessions of a visitor, less than alpha.
    """
    rng, runs, alpha, cap = np.random.default_rng(0), 200, 0.05, Rules().visitor_sessions
    wrong = {"all": 0, "capped": 0}
    for _ in range(runs):
        likings = rng.normal(0, 0.05, 100)
        shares = rng.zipf(1.6, 100).clip(max=1_000).astype(float)
        who = rng.choice(100, 1_500, p=shares / shares.sum())
        differences = np.clip(likings[who] + rng.normal(0, 0.25, len(who)), -1, 1)
        before = np.array([np.count_nonzero(who[:i] == visitor) for i, visitor in enumerate(who)])
        for name, counted in (("all", differences), ("capped", differences[before < cap])):
            highest = log_e(np.cumsum(counted), np.cumsum(counted**2)).max()
            wrong[name] += highest >= math.log(1 / alpha)
    assert wrong["all"] > 0.15 * runs
    assert wrong["capped"] <= alpha * runs


def test_a_champion_that_is_never_below_a_baseline_seldom_falls() -> None:
    """Both baselines are exactly as good as the champion: 200 reigns of 400 sessions."""
    fallen = 0
    for seed in range(200):
        rng, reign = np.random.default_rng(seed), Reign()
        for iou, last, own in np.clip(0.4 + rng.normal(0, 0.25, (400, 3)), 0, 1).tolist():
            one = score((iou, 0.1, 0.1), baselines={"last_session": last, "own_frequencies": own})
            reign.add(one, Rules(fall_alpha=0.05))
        fallen += reign.fallen
    assert fallen <= 10
