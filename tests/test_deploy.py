"""Containers and dashboards cannot be run everywhere; what they name must at least exist."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from streams.cli import app
from streams.metrics import Metrics
from streams.settings import Settings

ROOT = Path(__file__).parent.parent
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "browsecast.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def exported() -> set[str]:
    """Every sample name that a worker can show."""
    names = set()
    for metric in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        names |= {metric.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("path", [DASHBOARD, ALERTS], ids=lambda path: path.name)
def test_every_metric_that_is_drawn_or_watched_exists(path: Path) -> None:
    named = set(re.findall(r"\b(?:browsecast|process)_[a-z_]+", path.read_text()))
    assert len(named) > 5
    assert named - exported() == set()


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
    assert set(services) == {"topics", "worker", "predictor", "trainer"}
    for service in services.values():
        words = list(service["command"])
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known


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


def test_prometheus_asks_the_workers_port() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) <= set(compose()["services"])
    assert discovery["port"] == Settings().port
    assert f"EXPOSE {discovery['port']}" in (ROOT / "Dockerfile").read_text()


def test_the_image_runs_without_root_and_is_built_from_what_is_not_ignored() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    for target in ("gpu", "cpu"):
        stage = dockerfile.split(f"FROM runtime AS {target}\n")[1].split("FROM ")[0]
        assert stage.strip().endswith("USER browsecast")
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M) for word in line.split()}
    assert copied == kept
