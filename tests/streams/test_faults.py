"""Exactly once on a real broker, whatever dies: each case is compared with the oracle, repeats counted."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from streams.settings import Settings
from tests import scenarios
from tests.kafka import Kafka
from tests.ledger import Ledger, read_clicks, verdict
from tests.oracle import replay_log
from tests.play import Fault, Outcome, complete, metric, play, send_all
from tests.scenarios import freeze
from tests.traffic import Traffic, click
from tests.workers import Fleet, Worker

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(300)]
ROLES = ("sessionize",)
ALL_ROLES = ("sessionize", "predict", "score")
WORKER = ("streams.cli", "worker")

SettingsFor = Callable[..., Settings]


@pytest.fixture
def settings(sessionize_settings: Callable[[], Settings]) -> Settings:
    """One deployment."""
    return sessionize_settings()


@contextmanager
def fleet_of(settings: Settings, directory: Path, workers: int, roles: Sequence[str] = ROLES) -> Iterator[Fleet]:
    """A running fleet whose processes end with the test."""
    with Fleet([Worker(settings, directory / f"w{number}", roles) for number in range(workers)]) as fleet:
        fleet.start()
        yield fleet


def check(outcome: Outcome, fleet: Fleet) -> None:
    """No difference at all; else the first ones, with what the supervisor saw."""
    faults = outcome.faults
    assert not faults, f"{len(faults)} differences, workers ended {fleet.ended}: " + "\n".join(faults[:10])


@pytest.mark.parametrize("wipe", [False, True], ids=["kept", "wiped"])
def test_kill(settings: Settings, tmp_path: Path, wipe: bool) -> None:
    """kill -9 four times in the middle of the stream, both workers in turn, the state directory kept or lost."""
    with fleet_of(settings, tmp_path, 2) as fleet:
        one, two = fleet.workers
        victims = [(0.1, one), (0.3, two), (0.5, one), (0.7, two)]
        faults = [Fault(share, worker, partial(worker.kill, wipe)) for share, worker in victims]
        outcome = play(settings, fleet, Traffic(seed=11, forgets=0.002), faults)
        check(outcome, fleet)
        assert len(fleet.ended) >= 4


def test_rebalance_before_the_first_commit(settings: Settings, tmp_path: Path) -> None:
    """More workers come just when the first begins; then it dies."""
    faults = scenarios.early_rebalance(settings, tmp_path, WORKER, seed=12)
    assert not faults, "\n".join(faults[:10])


def test_frozen(settings: Settings, tmp_path: Path) -> None:
    """Each worker sleeps for longer than the session timeout and wakes: it is fenced, and writes nothing more."""
    faults = scenarios.frozen(settings, tmp_path, WORKER, seed=13)
    assert not faults, "\n".join(faults[:10])


def test_broker_killed(settings: Settings, kafka: Kafka, tmp_path: Path) -> None:
    """The broker is killed twice and comes back, once after a few seconds; a worker dies beside it."""
    with fleet_of(settings, tmp_path, 2) as fleet:

        def restart(away_s: float) -> Callable[[], None]:
            def fault() -> None:
                kafka.kill()
                time.sleep(away_s)
                kafka.restart()

            return fault

        faults = [
            Fault(0.3, fleet.workers[0], restart(0)),
            Fault(0.5, fleet.workers[1], fleet.workers[1].kill),
            Fault(0.7, fleet.workers[1], restart(5)),
        ]
        outcome = play(settings, fleet, Traffic(seed=14), faults)
        check(outcome, fleet)


def test_sigterm_drains(settings: Settings, tmp_path: Path) -> None:
    """Workers that leave in the middle of the stream end within 20 s, and nothing is repeated by those after them."""
    with fleet_of(settings, tmp_path, 2) as fleet:
        codes = []

        def leave(worker: Worker) -> Callable[[], None]:
            def fault() -> None:
                worker.terminate()
                codes.append(worker.wait(20))
                worker.start()

            return fault

        faults = [
            Fault(share, worker, leave(worker)) for share, worker in ((0.3, fleet.workers[0]), (0.6, fleet.workers[1]))
        ]
        outcome = play(settings, fleet, Traffic(seed=15), faults)
        check(outcome, fleet)
        assert codes == [0, 0] and not fleet.ended


def test_topics_missing(settings_for: SettingsFor, tmp_path: Path) -> None:
    """A worker refuses to start on topics that are not there, and says what to type."""
    worker = Worker(settings_for(topics=False), tmp_path / "w", ROLES)
    with Fleet([worker]):
        worker.start()
        assert worker.wait(60) == 3
        assert "browsecast topics create" in worker.tail()


def test_every_event_has_a_fate(settings: Settings, tmp_path: Path) -> None:
    """Poison of every kind is in clicks.rejected with its reason, and the metrics add up to what was received."""
    with fleet_of(settings, tmp_path, 1) as fleet:
        worker = fleet.workers[0]
        outcome = play(settings, fleet, Traffic(seed=16, events=4_000, poison=0.1, late=0.01, forgets=0.002))
        check(outcome, fleet)
        fates = list(outcome.expected.fates.values())
        assert len(set(outcome.expected.reasons.values())) >= 12
        fates = ["accepted" if fate == "forget" else fate for fate in fates]
        for fate in ("accepted", "duplicate", "late", "rejected"):
            assert metric(worker, "browsecast_events_total", fate=fate) == fates.count(fate), fate
        assert metric(worker, "browsecast_held_events") == fates.count("held") > 0
        assert metric(worker, "browsecast_received_events_total") == len(outcome.log)


def test_without_faults_nothing_is_repeated(settings: Settings, tmp_path: Path) -> None:
    """Else the harness itself would be suspect; and after all have left there is no record more."""
    with fleet_of(settings, tmp_path, 2) as fleet:
        outcome = play(settings, fleet, Traffic(seed=17))
        for worker in fleet.workers:
            worker.terminate()
        assert [worker.wait(20) for worker in fleet.workers] == [0, 0]
        outcome.ledger.read(2)
        outcome.faults[:] = verdict(outcome.expected, outcome.ledger, outcome.log, predicted=False)
        check(outcome, fleet)


def test_predictions_and_scores(settings: Settings, tiny_bundle: Path, tmp_path: Path) -> None:
    """All roles in each of two workers, killed three times: one prediction a session, one score a pair of sessions."""
    settings = settings.but(bundle=tiny_bundle)
    with fleet_of(settings, tmp_path, 2, ALL_ROLES) as fleet:
        one, two = fleet.workers
        victims = [(0.1, one, False), (0.3, two, True), (0.5, one, True)]
        faults = [Fault(share, worker, partial(worker.kill, wipe)) for share, worker, wipe in victims]
        outcome = play(settings, fleet, Traffic(seed=18, events=8_000), faults, predicted=True)
        check(outcome, fleet)
        assert outcome.ledger.scores and len(fleet.ended) >= 3


def test_roles_apart_and_frozen(settings: Settings, tiny_bundle: Path, tmp_path: Path) -> None:
    """Each role in a worker of its own; the predicting and the scoring one sleep and are killed."""
    settings = settings.but(bundle=tiny_bundle)
    workers = [Worker(settings, tmp_path / role, (role,)) for role in ALL_ROLES]
    workers.append(Worker(settings, tmp_path / "predict2", ("predict",)))
    _, predict, score, _ = workers
    with Fleet(workers) as fleet:
        fleet.start()
        faults = [
            Fault(0.1, predict, freeze(predict, fleet)),
            Fault(0.3, score, lambda: score.kill(wipe=True)),
            Fault(0.5, predict, predict.kill),
            Fault(0.6, score, score.kill),
        ]
        outcome = play(settings, fleet, Traffic(seed=19, events=8_000), faults, predicted=True)
        check(outcome, fleet)


def test_second_worker_on_the_same_state_directory(settings: Settings, tmp_path: Path) -> None:
    """Two workers share a directory by mistake: the second refuses with the exit code of an unusable state."""
    one, two = Worker(settings, tmp_path / "same", ROLES), Worker(settings, tmp_path / "same", ROLES)
    with Fleet([one, two]):
        one.start()
        one.wait_ready()
        two.start()
        try:
            assert two.wait(60) == 6
        except subprocess.TimeoutExpired:
            pytest.fail(f"the second worker runs on the first one's state:\n{two.tail()}")


def test_started_before_its_broker(settings: Settings, kafka: Kafka, tmp_path: Path) -> None:
    """A worker waits for its broker, alive and not ready, and says so; when the broker is there it serves."""
    worker = Worker(settings, tmp_path / "w", ROLES)
    kafka.kill()
    try:
        with Fleet([worker]):
            worker.start()
            deadline = time.monotonic() + 30
            while "waiting for the broker" not in worker.tail() and time.monotonic() < deadline:
                time.sleep(0.2)
            assert worker.running and worker.get("/live") is not None, worker.tail()
            assert worker.get("/ready") is None and "waiting for the broker" in worker.tail()
            kafka.restart()
            worker.wait_ready()
            worker.terminate()
            assert worker.wait(20) == 0
    finally:
        kafka.restart()


def test_quiet_partition_closes_in_live_mode(settings: Settings, tmp_path: Path) -> None:
    """Nothing comes after the last clicks, and yet all sessions close, the same as when the log has ended."""
    live = settings.but(clock="live", gap_ms=2_000, grace_ms=500, idle_ms=500)
    worker, ledger = Worker(live, tmp_path / "w", ROLES), Ledger(live)
    with Fleet([worker]) as fleet:
        fleet.start()
        worker.wait_ready()
        now = int(time.time() * 1000)
        sent = [click(f"u{n % 20}", now + n, "home", f"live{n}") for n in range(100)]
        send_all(live, sent)
        log = read_clicks(live, len(sent))
        expected = replay_log(log, live, ended=True)
        ledger.read_until(lambda: complete(expected, ledger, False), fleet.tick, patience_s=30)
        faults = verdict(expected, ledger, log, predicted=False)
        assert not faults, "\n".join(faults[:10])
