"""Real bundles on a real broker take over from each other, and damaged ones never do (F14)."""

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.bundle import Bundle, load_bundle
from models.routing import load_router
from streams.forecasting import visit_of
from streams.settings import Settings
from streams.wire import Session
from tests import damage
from tests.play import Outcome, metric
from tests.swapping import digest, name, play_on, shows, until, variant
from tests.traffic import Traffic
from tests.workers import Fleet, Worker, models

SAMPLE = 40  # predictions of each model that are made again
# Somebody gave the damaged files right digests; then only a look at what they hold can tell.
SIGNED = (damage.truncate, damage.put_a_pickle_in, damage.put_nan_in)
WAYS = [(harm, False) for harm in damage.DAMAGES] + [(harm, True) for harm in SIGNED]

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(1_200)]


def stirred(bundle: Path, directory: Path, seed: int, routes: bool) -> Path:
    """Another model in every digit; with `routes` also another router, so the users' sums are of no use to it."""
    work = directory.with_name(f"{directory.name}.work")
    shutil.copytree(bundle, work)
    rng = np.random.default_rng(seed)
    weights = load_file(work / damage.WEIGHTS)
    moved = {key: (value + rng.normal(0, 0.05, value.shape)).astype(value.dtype) for key, value in weights.items()}
    save_file(moved, work / damage.WEIGHTS, metadata={"format": "pt"})
    if routes:
        router = load_file(work / "selector.safetensors")
        router["chains.counts"] = router["chains.counts"] * (1 + seed)
        save_file(router, work / "selector.safetensors")
    return variant(work, directory, f"stirred {seed}")


@pytest.fixture
def settings(sessionize_settings: Callable[[], Settings], tiny_bundle: Path) -> Settings:
    return sessionize_settings().but(bundle=tiny_bundle, flush_ms=100, session_timeout_ms=30_000, history_tokens=5_000)


def routing_faults(outcome: Outcome, bundles: list[Path]) -> list[str]:
    """Sums that are not those of the router that they name over all sessions of the user so far."""
    routers = {(router := load_router(bundle)).digest: router for bundle in bundles}
    visits: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for session in outcome.ledger.sessions:
        visits[session["user_id"]].append(session)
    found = []
    for user, sessions in visits.items():
        so_far: list[list[str]] = []
        for session in sorted(sessions, key=lambda one: one["number"]):
            so_far.append(session["pages"])
            routing = session["context"]["routing"]
            sums, count = None, 0
            for pages in so_far:
                sums, count = routers[routing["digest"]].add(sums, count, pages)
            if (routing["sums"], routing["count"]) != (sums, count):
                found.append(f"{user}, session {session['number']}: {routing} instead of {sums}, {count}")
    return found


def prediction_faults(outcome: Outcome, models: dict[str, Bundle]) -> list[str]:
    """Predictions that the bundle they name does not make."""
    sessions = {session["session_id"]: session for session in outcome.ledger.sessions}
    found, looked = [], Counter[str]()
    for one in outcome.ledger.predictions:
        named = one["model_digest"]
        if named not in models:
            found.append(f"{one['prediction_id']} is by {named}")
            continue
        looked[named] += 1
        if looked[named] > SAMPLE:
            continue
        session = msgspec.convert(sessions[one["session_id"]], Session)
        (made,) = models[named].forecast([visit_of(session, models[named].router_digest)])
        if (made.path, made.cluster) != (one["path"], one["cluster"]) or not np.allclose(
            [made.cart, made.purchase], [one["cart"], one["purchase"]], atol=1e-4
        ):
            found.append(f"{one['prediction_id']} is not what {named} says: {one['path']}, {made.path}")
    assert set(looked) == set(models), f"{looked}"
    return found


def refused(worker: Worker) -> set[str]:
    """Addresses of the bundles that the worker's log says were refused."""
    lines = [json.loads(line) for line in worker.log.read_text().splitlines() if line.startswith("{")]
    return {line["bundle"] for line in lines if line["event"] == "a model is refused, what serves goes on"}


def test_real_bundles_take_over_and_damaged_ones_are_refused(
    settings: Settings, tiny_bundle: Path, tmp_path: Path
) -> None:
    good = [stirred(tiny_bundle, tmp_path / f"good{n}", n, routes=n > 1) for n in range(1, 4)]
    bad = []
    for harm, signed in WAYS:
        bundle = variant(tiny_bundle, tmp_path / f"{harm.__name__}{'-signed' * signed}", harm.__name__)
        bad.append((harm, signed, bundle))
    with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
        fleet.start()
        (worker,) = fleet.workers
        worker.wait_ready()

        def predicted() -> float:
            return metric(worker, "browsecast_predictions_total")

        def steps() -> Iterator[None]:
            yield from shows(worker, SAMPLE, "predictions_total")
            for number, bundle in enumerate(good, 1):
                name(settings, "champion", bundle)
                yield from shows(worker, number, "model_swaps_total")
                yield from shows(worker, predicted() + SAMPLE, "predictions_total")
            for number, (harm, signed, bundle) in enumerate(bad, 1):
                if signed:
                    harm(bundle)
                    damage.resign(bundle)
                    name(settings, "champion", bundle)
                else:
                    named = digest(bundle)
                    harm(bundle)
                    assert digest(bundle) == named  # the manifest is as it was
                    name(settings, "champion", bundle)
                yield from until(bundle.as_uri() in refused(worker) for _ in iter(int, 1))
                assert metric(worker, "browsecast_models_refused_total", alias="champion") >= number
                assert metric(worker, "browsecast_model_loaded", digest=digest(good[-1])) == 1
            name(settings, "challenger", bad[-2][2])  # not what `champion` names: that one was promoted, not tried
            yield from shows(worker, 1, "models_refused_total", alias="challenger")
            assert metric(worker, "browsecast_challenger_loaded") == 0
            yield from shows(worker, predicted() + SAMPLE, "predictions_total")
            name(settings, "champion", good[0])
            yield from shows(worker, len(good) + 1, "model_swaps_total")

        outcome = play_on(settings, fleet, Traffic(seed=47, events=100_000, users=1_000), steps())
        assert not outcome.faults, "\n".join(outcome.faults[:10]) + worker.tail()
        assert not fleet.ended and len(models(worker.process.pid)) == 1
        assert refused(worker) == {bundle.as_uri() for _, _, bundle in bad}
    loaded = {digest(bundle): load_bundle(bundle, "cpu") for bundle in (tiny_bundle, *good)}
    assert not (wrong := prediction_faults(outcome, loaded)), wrong[:5]
    assert not (wrong := routing_faults(outcome, [tiny_bundle, *good])), wrong[:5]
    routed = {session["context"]["routing"]["digest"] for session in outcome.ledger.sessions}
    assert routed == {model.router_digest for model in loaded.values()} and len(routed) == 3
    assert not any(one["fallback"] for one in outcome.ledger.predictions)
    makers = Counter(one["model_digest"] for one in outcome.ledger.predictions)
    print(f"{len(good) + 1} swaps, {len(bad)} refusals, predictions by model {list(makers.values())}")
