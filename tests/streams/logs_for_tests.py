"""The real logs of the workplace, where they are there: tests that need one skip without."""

from pathlib import Path

import pytest

DATA = Path(__file__).parents[2].parent / "shared" / "data"
REAL_LOGS = {
    "apache": "apache_combined_2015-05.log",
    "eshop": "eshop_pages_clickstream.csv",
    "globo": "globo_clicks.parquet",
    "kechinov": "kechinov_2019-10-01.csv",
    "nasa": "nasa_1995-07-01.log",
}


def real_log(profile: str) -> Path:
    """The log that the ready profile is for; skips the test without it."""
    path = DATA / REAL_LOGS[profile]
    if not path.exists():
        pytest.skip(f"{path.name} is not there")
    return path
