"""Another champion takes over while everything runs: nothing is lost, repeated or made by a mixture."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from streams.settings import Settings
from tests.play import Outcome, metric
from tests.swapmodel import DYING, HANGING, SLOW
from tests.swapping import WORKER, digest, name, play_on, shows, until, variant
from tests.traffic import Traffic
from tests.workers import Fleet, Worker, models

SWAPS = 100
KIB_FLAT = 4 * 1024  # of the worker's memory over 80 swaps

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(1_200)]


@pytest.fixture
def bundles(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    """Bundles that tell themselves apart by their digests."""
    return [variant(tiny_bundle, tmp_path / f"v{number}", f"variant {number}") for number in range(4)]


@pytest.fixture
def settings(sessionize_settings: Callable[[], Settings], bundles: list[Path]) -> Settings:
    return sessionize_settings().but(bundle=bundles[0], flush_ms=100, session_timeout_ms=30_000)


def check(outcome: Outcome, worker: Worker) -> None:
    """Exactly once, and each prediction and shadow by the model that it names."""
    assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
    for one in outcome.ledger.predictions:
        assert one["path"] == [one["model_digest"]] and one["fallback"] is None
        shadow = one["shadow"]
        assert shadow is None or shadow["path"] == [shadow["model_digest"]]


def makers(outcome: Outcome) -> Counter[str]:
    return Counter(one["model_digest"] for one in outcome.ledger.predictions)


def predicted(worker: Worker, bundle: Path | None = None) -> float:
    """Predictions by the bundle, as the worker counts them; by all bundles without one."""
    labels = {} if bundle is None else {"model": digest(bundle)[7:15]}
    return metric(worker, "browsecast_predictions_total", **labels)


def more(count: Callable[[], float], by: float = 20) -> Iterator[None]:
    """Hand over until the count has grown so much."""
    least = count() + by
    return until(count() >= least for _ in iter(int, 1))


def resident_kib(worker: Worker) -> int:
    status = Path(f"/proc/{worker.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+)", status)
    assert found is not None
    return int(found[1])


def test_a_hundred_swaps_under_load(settings: Settings, bundles: list[Path], tmp_path: Path) -> None:
    """Memory stays flat, and no process stays behind.

    The role that has the models is in a worker of its own: the state of the others grows with the traffic.
    """
    worker = Worker(settings, tmp_path / "predict", ("predict",), WORKER)
    with Fleet([worker, Worker(settings, tmp_path / "others", ("sessionize", "score"), WORKER)]) as fleet:
        fleet.start()
        for one in fleet.workers:
            one.wait_ready()
        sizes = []

        def steps() -> Iterator[None]:
            for number in range(1, SWAPS + 1):
                name(settings, "champion", bundles[number % len(bundles)])
                yield from shows(worker, number, "model_swaps_total")
                sizes.append(resident_kib(worker))

        outcome = play_on(settings, fleet, Traffic(seed=41, events=100_000, users=1_000), steps())
        check(outcome, worker)
        assert set(makers(outcome)) == {digest(bundle) for bundle in bundles}
        print(f"{SWAPS} swaps, {sum(makers(outcome).values())} predictions, KiB {sizes[::10]}")
        assert not fleet.ended and len(models(worker.process.pid)) == 1
        assert metric(worker, "browsecast_model_loaded") == 1
        for one in fleet.workers:
            assert metric(one, "browsecast_models_refused_total") == 0
            assert metric(one, "browsecast_model_swaps_total") > 0.9 * SWAPS  # whoever is slow leaves one out
        assert max(sizes[-10:]) - max(sizes[10:20]) < KIB_FLAT, sizes
        routed = {one["context"]["routing"]["digest"] for one in outcome.ledger.sessions}
        assert len(routed) == 1  # these bundles share their router


def test_what_loads_or_challenges_beside_the_champion_delays_and_harms_nothing(
    settings: Settings, bundles: list[Path], tiny_bundle: Path, tmp_path: Path
) -> None:
    """A champion that is slow to load; challengers that are slow to load, hang, and die. All are taken off."""
    slow, hanging, dying = (
        variant(tiny_bundle, tmp_path / f"special{number}", card) for number, card in enumerate((SLOW, HANGING, DYING))
    )
    settings = settings.but(shadow_share=1.0, shadow_wait_ms=50)
    first = bundles[0]
    with Fleet([Worker(settings, tmp_path / "w", module=WORKER)]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()

        def shadowed(outcome: str) -> float:
            return metric(worker, "browsecast_shadow_predictions_total", outcome=outcome)

        def challenged_by(bundle: Path) -> Iterator[None]:
            return shows(worker, 1, "challenger_loaded", digest=digest(bundle))

        def steps() -> Iterator[None]:
            yield from more(lambda: predicted(worker))
            before = predicted(worker, first)
            name(settings, "challenger", slow)
            yield from challenged_by(slow)
            assert predicted(worker, first) > before  # while it was loaded
            yield from more(lambda: shadowed("made"))
            name(settings, "challenger", hanging)
            yield from challenged_by(hanging)
            yield from more(lambda: shadowed("busy"))
            name(settings, "challenger", dying)
            yield from shows(worker, 1, "models_refused_total", alias="challenger")
            yield from more(lambda: predicted(worker, first))
            before = predicted(worker, first)
            name(settings, "champion", slow)
            yield from shows(worker, 1, "model_swaps_total")
            assert predicted(worker, first) > before
            name(settings, "challenger", None)
            yield from more(lambda: predicted(worker, slow))

        outcome = play_on(settings, fleet, Traffic(seed=43, events=60_000, users=1_000), steps())
        check(outcome, worker)
        assert set(makers(outcome)) == {digest(first), digest(slow)}
        shadows = Counter(one["shadow"]["model_digest"] for one in outcome.ledger.predictions if one["shadow"])
        assert set(shadows) == {digest(slow)}  # the others answered nothing
        assert not fleet.ended and len(models(worker.process.pid)) == 1
        assert metric(worker, "browsecast_challenger_loaded") == 0
