"""All settings, read once: environment (`BROWSECAST_*`), `.env`, a TOML file. Nobody else reads the environment."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS
DAY_MS = 24 * HOUR_MS
CONFIG_VARIABLE = "BROWSECAST_CONFIG"
DEFAULT_CONFIG = "browsecast.toml"


class Settings(BaseSettings):
    """One frozen object. Each field can be set as BROWSECAST_<NAME>, in `.env`, or in browsecast.toml by its name."""

    model_config = SettingsConfigDict(env_prefix="BROWSECAST_", env_file=".env", frozen=True, extra="ignore")

    # Kafka
    bootstrap_servers: str = Field("127.0.0.1:9092", description="Kafka brokers, HOST:PORT[,HOST:PORT...]")
    topic_prefix: str = Field("", description="put before every topic, group and transactional id")
    partitions: int = Field(8, ge=1, description="partitions of every topic; never change it later")
    replication_factor: int = Field(1, ge=1, description="replicas of the topics that `topics create` makes")
    min_insync_replicas: int = Field(1, ge=1, description="replicas that must have a record to acknowledge it")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how every client talks to the brokers"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = Field(
        "PLAIN", description="used when the protocol has SASL in its name"
    )
    sasl_username: str | None = Field(None, description="SASL user")
    sasl_password: SecretStr | None = Field(None, description="SASL password")
    ssl_cafile: Path | None = Field(None, description="PEM file of the authority that signed the brokers")
    ssl_certfile: Path | None = Field(None, description="PEM file of the client's certificate")
    ssl_keyfile: Path | None = Field(None, description="PEM file of the client's key")
    session_timeout_ms: int = Field(10_000, ge=1_000, description="a silent worker loses its partitions after this")
    transaction_timeout_ms: int = Field(30_000, ge=1_000, description="the broker aborts a transaction after this")

    # Sessions
    gap_ms: int = Field(30 * MINUTE_MS, ge=1, description="neighbouring events of a session are at most this far apart")
    grace_ms: int = Field(5 * MINUTE_MS, ge=0, description="how far out of order events may come")
    ahead_ms: int = Field(HOUR_MS, ge=1, description="an event further ahead of the watermark is held")
    ahead_users: int = Field(3, ge=1, description="so many users that far ahead move the watermark")
    held_events: int = Field(1_000, ge=1, description="most events held in a partition; more are rejected")
    max_session_events: int = Field(1_000, ge=1, description="longer sessions are cut")
    max_session_ms: int = Field(DAY_MS, ge=1, description="longer sessions are cut")
    max_events_per_minute: int = Field(600, ge=1, description="a user's events above this rate are rejected")
    history_tokens: int = Field(512, ge=8, description="tokens of past sessions kept for a user")
    forget_after_ms: int = Field(90 * DAY_MS, ge=1, description="a user silent for so long is forgotten")
    expire_after_ms: int = Field(30 * DAY_MS, ge=1, description="a prediction waits so long for its session")
    profile: str | None = Field(None, description="site profile: a TOML file or the name of a ready one")

    # Items
    seeds: Literal["channels", "recency"] = Field(
        "channels", description="seed events: the newest item of each of the heaviest channels, or the last items"
    )
    seed_events: int = Field(5, ge=1, le=100, description="most seed events kept for a user")
    seed_gamma: float = Field(
        0.923, gt=0.0, le=1.0, description="with each event a channel's weight falls to so much of it"
    )
    seed_protect: bool = Field(True, description="a channel survives its own event, however heavy the others are")
    recent_items: int = Field(30, ge=1, le=1_000, description="newest items of a user; older ones may be shown again")
    ranked_items: int = Field(20, ge=1, le=1_000, description="items in a prediction")

    # Models
    bundle: Path | None = Field(None, description="directory of the model bundle that predicts while no champion is")
    registry: str = Field("registry", description="where published bundles lie: a directory or any address of fsspec")
    follow_models: bool = Field(True, description="serve the champion that the topic models names; else only BUNDLE")
    shadow_share: float = Field(0.2, ge=0.0, le=1.0, description="share of users for whom the challenger predicts too")
    shadow_wait_ms: int = Field(20, ge=0, description="a prediction waits so long for the challenger's")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    model_threads: int = Field(0, ge=0, description="CPU threads of the model; 0: all cores but one")
    batch_sessions: int = Field(64, ge=1, description="most sessions in a micro-batch")
    batch_ms: int = Field(2, ge=0, description="a micro-batch waits so long for more sessions")
    model_retries: int = Field(1, ge=0, description="a failing model is tried again so often")

    # Archive
    archive_dir: Path = Field(Path("archive"), description="where the trainer keeps the sessions, as Parquet by day")
    archive_flush_ms: int = Field(10_000, ge=1, description="a session waits so long for its file, at most about")
    archive_flush_sessions: int = Field(50_000, ge=1, description="sessions in a commit of the archive, at most about")
    archive_retention_days: int = Field(90, ge=1, description="sessions so long before the newest one are deleted")
    archive_forget_ms: int = Field(DAY_MS, ge=1, description="forgotten users are gone from the files within this")

    # Trainer
    trainer_dir: Path = Field(Path("trainer-state"), description="where the trainer keeps its refreshes and evidence")
    trainer_port: int = Field(6067, ge=0, le=65_535, description="HTTP port of the trainer's /metrics; 0: a free one")
    refresh_sessions: int = Field(5_000, ge=1, description="so many new sessions make a refresh of the models due")
    refresh_ms: int = Field(DAY_MS, ge=1, description="so long after the last refresh REFRESH_LEAST are enough")
    refresh_least: int = Field(500, ge=1, description="new sessions that time or drift must wait for")
    refresh_from: Literal["champion", "scratch"] = Field("champion", description="what a refresh goes on from")
    refresh_margin: float = Field(0.05, ge=0.0, description="a candidate may be worse by so much of a rival's figure")
    window_days: int = Field(30, ge=1, description="a refresh learns from the sessions of so many days")
    judged_share: float = Field(0.2, gt=0.0, lt=1.0, description="of the new sessions, the latest judge the candidate")
    judged_users: int = Field(2_000, ge=1, description="most visitors that judge a candidate")
    judge_alpha: float = Field(0.05, gt=0.0, lt=1.0, description="a challenger no better wins with this probability")
    judge_margin: float = Field(0.01, gt=0.0, lt=1.0, description="it may lose less than this of a Brier score")
    judge_sessions: int = Field(20_000, ge=1, description="a challenger not shown to be better goes after these")
    judge_visitor_sessions: int = Field(20, ge=1, description="later sessions of a visitor do not count in a trial")
    judge_fall_alpha: float = Field(0.01, gt=0.0, lt=1.0, description="a sound champion falls with this probability")

    # Worker
    state_dir: Path = Field(Path("state"), description="where RocksDB keeps the workers' state")
    clock: Literal["live", "log"] = Field(
        "live", description="live: quiet partitions run at wall speed; log: only events move time"
    )
    idle_ms: int = Field(1_000, ge=1, description="a partition at its head is quiet after this")
    flush_events: int = Field(5_000, ge=1, description="events in a transaction, at most about")
    flush_ms: int = Field(500, ge=1, description="time between transactions, at most about")
    cache_users: int = Field(100_000, ge=1, description="decoded users kept in memory, over all partitions")
    host: str = Field("127.0.0.1", description="address of the worker's HTTP port")
    port: int = Field(6066, ge=0, le=65_535, description="HTTP port of /live, /ready and /metrics; 0 takes a free one")
    watchdog_ms: int = Field(60_000, ge=1_000, description="a worker with lag and no progress for so long ends")
    drain_ms: int = Field(15_000, ge=1, description="SIGTERM: time to finish what is under way")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="lowest level logged")

    def topic(self, name: str) -> str:
        """The topic's full name, e.g. `clicks` -> `shop1.clicks`."""
        return self.topic_prefix + name

    def application(self, role: str) -> str:
        """Name of a role's consumer group, and the stem of its transactional ids and changelog."""
        return f"{self.topic_prefix}browsecast-{role}"

    def changelog(self, role: str) -> str:
        """Topic that holds a role's state: a record a user, compacted."""
        return f"{self.application(role)}-state-changelog"

    def carried(self) -> dict[str, Any]:
        """All values, secrets included, so that a process of ours can make the same settings of them."""
        values = self.model_dump(mode="json", exclude_none=True)
        secrets = {name: value for name, value in self if isinstance(value, SecretStr)}
        return values | {name: secret.get_secret_value() for name, secret in secrets.items()}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments beat the environment, which beats `.env`, which beats the TOML file."""
        toml = TomlConfigSettingsSource(settings_cls, Path(os.environ.get(CONFIG_VARIABLE, DEFAULT_CONFIG)))
        return init_settings, env_settings, dotenv_settings, toml

    def but(self, **changes: Any) -> "Settings":
        """A copy with some settings changed, validated anew; None leaves a setting as it is."""
        given = {name: value for name, value in changes.items() if value is not None}
        return Settings(**{**{name: getattr(self, name) for name in self.model_fields_set}, **given})
