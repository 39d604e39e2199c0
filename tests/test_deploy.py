"""Containers and dashboards cannot be run everywhere; what they name must at least exist."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from streams.cli import app
from streams.metrics import Metrics
from streams.settings import Settings
from tests.promql import Samples, fires, scraped
from trainer.drift import LIMITS
from trainer.trainermetrics import TrainerMetrics

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "browsecast.json"
ROLES = ("sessionize", "predict", "score")
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def exported() -> set[str]:
    """Every sample name that a worker or a trainer can show."""
    names = set()
    for metric in (*Metrics().registry.collect(), *TrainerMetrics().registry.collect()):
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        names |= {metric.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_every_metric_that_is_drawn_or_watched_exists(path: Path) -> None:
    named = set(re.findall(r"\b(?:browsecast|process)_[a-z_]+", path.read_text()))
    assert len(named) > 5
    assert named - exported() == set()


def rules() -> dict[str, str]:
    """Alert -> expression."""
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def up(job: str, value: float) -> dict[str, Any]:
    """What Prometheus itself tells of a target."""
    return {"up": {frozenset({("job", job)}): value}}


# What happens, by the alert that must be raised upon it. Drift has tests of its own: tests/trainer/test_driftwatch.py.
MISHAPS: dict[str, Callable[[TrainerMetrics, Metrics], object]] = {
    "ModelRefused": lambda trainer, worker: worker.models_refused.labels("champion").inc(),
    "ChallengerLost": lambda trainer, worker: worker.models_refused.labels("challenger").inc(),
    "ArchiveFallsBehind": lambda trainer, worker: trainer.archive_lag.labels(0).set(100_001),
    "RefreshFailed": lambda trainer, worker: trainer.refreshes.labels("failed").inc(),
    "ChampionBelowBaseline": lambda trainer, worker: trainer.below_baseline.set(True),
    "RolledBack": lambda trainer, worker: trainer.decisions.labels("rolled_back").inc(),
    "Drift": lambda trainer, worker: trainer.show_drift({"pages": 1.0, "clusters": 0.0}, LIMITS),
}


@pytest.mark.parametrize("alert", MISHAPS)
def test_an_alert_fires_upon_what_it_is_for_and_no_other_does(alert: str) -> None:
    trainer, worker = TrainerMetrics(), Metrics()

    def scrape() -> Samples:
        return scraped(trainer.render()) | scraped(worker.render())

    before = scrape()
    assert not [name for name in MISHAPS if fires(rules()[name], before, before)]
    MISHAPS[alert](trainer, worker)
    raised = {name: fires(rules()[name], before, scrape()) for name in MISHAPS}
    assert [name for name, found in raised.items() if found] == [alert]


def test_what_the_trainer_does_by_itself_raises_no_alert() -> None:
    trainer, worker = TrainerMetrics(), Metrics()
    before = scraped(trainer.render()) | scraped(worker.render())
    for kind in ("published", "promoted", "retired", "refused"):
        trainer.decisions.labels(kind).inc()
    for result in ("published", "refused"):
        trainer.refreshes.labels(result).inc()
    trainer.archive_lag.labels(0).set(50_000)
    trainer.show_drift(LIMITS, LIMITS)
    worker.model_swaps.inc()
    now = scraped(trainer.render()) | scraped(worker.render())
    assert not [name for name in MISHAPS if fires(rules()[name], before, now)]


def test_a_trainer_that_is_down_or_gone_is_told() -> None:
    expression = rules()["TrainerDown"]
    assert not fires(expression, {}, up("browsecast-trainer", 1))
    assert fires(expression, {}, up("browsecast-trainer", 0))
    assert fires(expression, {}, up("browsecast", 1))


def test_the_alerts_of_the_trainer_are_all_tested() -> None:
    groups = {group["name"]: group["rules"] for group in yaml.safe_load(ALERTS.read_text())["groups"]}
    assert {rule["alert"] for rule in groups["browsecast-trainer"]} <= {*MISHAPS, "TrainerDown"}


def test_the_dashboard_names_the_provisioned_datasource_and_no_panel_twice() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    provisioned = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    (uid,) = (source["uid"] for source in provisioned["datasources"])
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {uid}
    titles = [panel["title"] for panel in dashboard["panels"]]
    assert len(set(titles)) == len(titles)


def test_our_services_call_commands_that_exist_with_options_that_exist() -> None:
    services = {
        name: service for name, service in compose()["services"].items() if service.get("image") == "browsecast"
    }
    assert set(services) == {"topics", "worker", "predictor", "trainer", "tools"}
    for service in services.values():
        words = list(service["command"])
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert not hasattr(command, "commands") or command.invoke_without_command
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known
        assert all(word.startswith("--") or word in ROLES or "/" in word for word in words)


def test_the_environment_of_the_containers_names_settings() -> None:
    variables = {f"BROWSECAST_{name.upper()}" for name in Settings.model_fields}
    for service in compose()["services"].values():
        assert {name for name in service.get("environment", {}) if name.startswith("BROWSECAST_")} <= variables
    assert set(re.findall(r"\bBROWSECAST_[A-Z_]+\b", (ROOT / "Dockerfile").read_text())) <= variables


def test_volumes_files_and_dependencies_of_the_services_are_there() -> None:
    found = compose()
    for service in found["services"].values():
        assert set(service.get("depends_on", {})) <= set(found["services"])
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source == "./logs":  # the user's own
                continue
            assert (ROOT / source).is_dir() if source.startswith("./") else source in found["volumes"]


def test_prometheus_asks_the_ports_of_workers_and_trainer() -> None:
    jobs = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    ports = {"browsecast": Settings().port, "browsecast-trainer": Settings().trainer_port}
    services, exposed = compose()["services"], re.findall(r"^EXPOSE (.+)$", (ROOT / "Dockerfile").read_text(), re.M)
    for job in jobs:
        (discovery,) = job["dns_sd_configs"]
        assert discovery["port"] == ports.pop(job["job_name"])
        assert str(discovery["port"]) in exposed[0].split()
        for name in discovery["names"]:
            assert any(published.endswith(f":{discovery['port']}") for published in services[name]["ports"])
    assert not ports


def test_whoever_reads_and_writes_bundles_sees_them_at_one_place() -> None:
    """An alias names a bundle by its path."""
    services = compose()["services"]
    for name in ("worker", "predictor", "trainer", "tools"):
        (place,) = (volume.split(":")[1] for volume in services[name]["volumes"] if volume.startswith("registry:"))
        assert f"BROWSECAST_REGISTRY={place}" in (ROOT / "Dockerfile").read_text()


def test_every_volume_of_a_service_is_a_directory_of_the_image_that_its_user_may_write_to() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    made = re.findall(r"/data/[a-z-]+", re.search(r"mkdir --parents (.+)", dockerfile)[1])  # type: ignore[index]
    for service in compose()["services"].values():
        for volume in service.get("volumes", []) if service.get("image") == "browsecast" else []:
            assert volume.startswith("./") or volume.split(":")[1] in made
    assert set(re.findall(r"BROWSECAST_\w+=(/data/[a-z-]+)", dockerfile)) <= set(made)


def test_the_image_runs_without_root_and_is_built_from_what_is_not_ignored() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target in ("gpu", "cpu"):
        stage = dockerfile.split(f"FROM runtime AS {target}\n")[1].split("FROM ")[0]
        assert stage.strip().endswith("USER browsecast")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M) for word in line.split()}
    assert copied == kept
