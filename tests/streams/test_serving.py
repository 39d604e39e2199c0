"""What a worker says of a bundle that it takes up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from models.items import SeedRule
from streams.metrics import Metrics
from streams.serving import Models
from streams.settings import Settings
from tests.goods import goods, with_items

TRAINED = SeedRule("recency", 10)


@pytest.mark.parametrize(
    ("rule", "settings", "said"),
    [
        (SeedRule(), {}, None),
        (TRAINED, {"seeds": "recency", "seed_events": 10}, None),
        (TRAINED, {}, "BROWSECAST_SEEDS=recency BROWSECAST_SEED_EVENTS=10"),
    ],
)
def test_a_worker_that_keeps_other_seeds_than_the_bundle_wants_says_so(
    rule: SeedRule, settings: dict[str, Any], said: str | None, tiny_bundle: Path, tmp_path: Path
) -> None:
    bundle = with_items(tiny_bundle, tmp_path / "bundle", goods(seeding=rule))
    models = Models(Settings(bundle=bundle, follow_models=False, **settings), Metrics(), ["sessionize"])

    async def begin() -> None:
        assert (await models.begin()).items is not None
        await models.close()

    with capture_logs() as logs:
        asyncio.run(begin())
    warnings = [one["settings"] for one in logs if one["log_level"] == "warning"]
    assert warnings == ([said] if said else [])
