import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import typer.main
from kafka import KafkaConsumer, KafkaProducer
from typer.testing import CliRunner

from streams import cli, modelcli, rejected, users, wire
from streams.partitioner import partition_of
from streams.settings import DAY_MS, Settings
from trainer.trial import Rules

NOWHERE = "127.0.0.1:1"
ROOT = Path(__file__).parents[2]


def browsecast(*words: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own."""
    command = [sys.executable, "-c", "from streams.cli import main; main()", *words]
    variables = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "200"} | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, timeout=120)


def commands() -> dict[str, list[str]]:
    """Words of each command -> its options."""

    def walk(command: object, words: tuple[str, ...]) -> dict[str, list[str]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            options = [option for parameter in command.params for option in parameter.opts]  # type: ignore[attr-defined]
            return {" ".join(words): options}
        found: dict[str, list[str]] = {}
        if getattr(command, "invoke_without_command", False):
            found[" ".join(words)] = [option for parameter in command.params for option in parameter.opts]  # type: ignore[attr-defined]
        for name, child in inner.items():
            found |= walk(child, (*words, name))
        return found

    return walk(typer.main.get_command(cli.app), ())


def test_every_command_of_the_plan_is_there_and_explains_itself() -> None:
    planned = (
        "demo, worker, topics create, topics check, publish, replay, watch, rejected show, rejected resend, user show, "
        "user forget, train, evaluate, schema, settings, trainer, trainer once, models list, models show, "
        "models publish, models promote, models rollback, models verify, models prune, items publish, items remove, "
        "items evaluate"
    )
    assert set(commands()) == set(planned.split(", "))
    for words in commands():
        result = CliRunner().invoke(cli.app, [*words.split(), "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from streams.cli import app\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'faust', 'aiokafka', 'pyarrow', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_lists_the_exit_codes() -> None:
    output = " ".join(browsecast("--help").stdout.split())
    for code in (
        "2 wrong option",
        "3 topics",
        "4 no broker",
        "5 bundle refused",
        "7 a transaction",
        "8 worker stalled",
    ):
        assert code in output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("replay", "nowhere.log", "--sessions", "out"), 2, "nowhere.log"),
        (("replay", "-", "--speed", "fast"), 2, "--speed 'fast'"),
        (("replay", "-", "--profile", "nobody"), 2, "nobody"),
        (("schema", "nothing"), 2, "clicks"),
        (("train", "--sessions", "nowhere", "--bundle", "out"), 2, "nowhere"),
        (("evaluate", "--bundle", "nowhere", "--sessions", "s", "--report", "r"), 5, "nowhere"),
        (("items", "publish", "nope.jsonl", "--bootstrap-servers", NOWHERE), 2, "error: nope.jsonl: there is no"),
        (("publish", "nope.jsonl", "--bootstrap-servers", NOWHERE), 2, "error: nope.jsonl: there is no"),
        (("items", "remove", "42", "", "--bootstrap-servers", NOWHERE), 2, "'' has no characters, or more than 2048"),
        (("items", "remove", "z" * 3_000, "--bootstrap-servers", NOWHERE), 2, "nothing was removed"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_a_known_error_is_a_line_without_a_traceback(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    done = browsecast(*words, cwd=tmp_path)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_settings_shows_values_and_sources_and_masks_secrets(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BROWSECAST_GAP_MS=600000\n")
    (tmp_path / "browsecast.toml").write_text("grace_ms = 1234\n")
    done = browsecast(
        "settings",
        cwd=tmp_path,
        BROWSECAST_SASL_PASSWORD="geheim",
        BROWSECAST_TOPIC_PREFIX="shop.",
        BROWSECAST_PORT="7000",
    )
    assert done.returncode == 0
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") > 4}
    assert set(lines) == set(Settings.model_fields)
    assert "geheim" not in done.stdout + done.stderr
    assert "*****" in lines["sasl_password"]
    for name, value, source in (
        ("port", "7000", "environment"),
        ("gap_ms", "600000", ".env"),
        ("grace_ms", "1234", "browsecast.toml"),
        ("flush_ms", str(Settings().flush_ms), "default"),
    ):
        assert value in lines[name]
        assert source in lines[name]


def test_a_wrong_setting_is_named_without_its_value(tmp_path: Path) -> None:
    done = browsecast("settings", cwd=tmp_path, BROWSECAST_PORT="geheim")
    assert done.returncode == 2
    assert "port" in done.stderr
    assert "geheim" not in done.stderr


def test_schema_is_json(tmp_path: Path) -> None:
    done = browsecast("schema", "clicks", cwd=tmp_path)
    assert done.returncode == 0
    assert {"user_id", "ts", "page"} <= set(json.dumps(json.loads(done.stdout)).replace('"', " ").split())


@pytest.mark.kafka
def test_topics_are_created_checked_and_named_when_missing(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(topics=False)
    where = ("--bootstrap-servers", settings.bootstrap_servers, "--topic-prefix", settings.topic_prefix)
    missing = browsecast("topics", "check", *where)
    assert missing.returncode == 3
    assert "browsecast topics create" in missing.stderr
    assert browsecast("topics", "create", *where).returncode == 0
    assert browsecast("topics", "check", *where).returncode == 0


@pytest.mark.kafka
def test_rejected_events_are_resent_unchanged_and_once_each(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(partitions=2)
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap_servers)
    originals = [(b"u-1", b"{broken"), (None, b"\xff\x00"), (b"u-2", b'{"ts": "x"}')]
    for number, (key, value) in enumerate(originals):
        record = wire.Rejected(
            reason=("invalid_json", "no_key", "invalid_json")[number],
            stage="decode",
            message="wrong",
            original=_base64(value),
            original_key=_base64(key),
            topic=settings.topic(wire.CLICKS),
            partition=0,
            offset=number,
        )
        producer.send(settings.topic(wire.REJECTED), msgspec.json.encode(record), key=key).get(10)
    producer.close()
    assert [reject.original for reject in rejected.last(settings, 2)] == [value for _, value in originals[1:]]
    assert rejected.resend(settings, "invalid_json", dry_run=True).total() == 2
    assert rejected.resend(settings, "invalid_json").total() == 2
    assert rejected.resend(settings).most_common() == [("no_key", 1)]
    assert rejected.resend(settings).total() == 0
    sent = _records(settings, wire.CLICKS, 3)
    assert sorted(sent, key=str) == sorted(originals, key=str)


@pytest.mark.kafka
def test_forget_publishes_the_null_value_on_the_users_partition(settings_for: Callable[..., Settings]) -> None:
    settings = settings_for(partitions=4)
    partition, offset = users.forget(settings, "u-1")
    assert (partition, offset) == (partition_of(b"u-1", 4), 0)
    assert _records(settings, wire.CLICKS, 1) == [(b"u-1", None)]
    assert users.show(settings, "u-1") is None


def test_without_a_broker_the_exit_code_is_4(tmp_path: Path) -> None:
    done = browsecast("user", "show", "u-1", "--bootstrap-servers", NOWHERE, cwd=tmp_path)
    assert done.returncode == 4
    assert NOWHERE in done.stderr


def _records(settings: Settings, topic: str, count: int) -> list[tuple[bytes | None, bytes | None]]:
    consumer = KafkaConsumer(
        settings.topic(topic),
        bootstrap_servers=settings.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        consumer_timeout_ms=5_000,
    )
    found = []
    for message in consumer:
        found.append((message.key, message.value))
        if len(found) == count:
            break
    consumer.close()
    return found


def _base64(value: bytes | None) -> str | None:
    return None if value is None else base64.b64encode(value).decode()


def test_the_judge_s_rules_and_the_refresh_are_settings() -> None:
    given = Settings(judge_alpha=0.2, judge_margin=0.03, judge_sessions=7, judge_visitor_sessions=5,
                     judge_fall_alpha=0.4, refresh_margin=0.5, window_days=3)  # fmt: skip
    options, _ = modelcli.options_of(given, None)
    assert options.rules == Rules(0.2, 0.03, 7, 5, 0.4)
    assert (options.refresh.margin, options.refresh.window_ms) == (0.5, 3 * DAY_MS)
