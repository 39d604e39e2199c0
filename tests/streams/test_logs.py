import json
import logging

import pytest
import structlog

from streams import logs


@pytest.fixture(autouse=True)
def restore_logging() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_lines_are_json_with_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", json=True)
    log = structlog.get_logger("streams.test")
    log.info("partition restored", partition=3)
    log.debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["partition"], entry["level"]) == ("partition restored", 3, "info")
    assert entry["timestamp"].endswith("Z")


def test_libraries_speak_from_warnings_up_and_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", json=True)
    logging.getLogger("aiokafka.consumer").info("chatter")
    logging.getLogger("aiokafka.consumer").warning("heartbeat\n  failed: %s", "x")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "heartbeat failed: x"
