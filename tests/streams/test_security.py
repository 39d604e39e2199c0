"""A broker that asks for TLS and a password: everything reaches it, and nobody gets in without."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from streams import topics, watching
from streams.errors import BrokerUnavailable
from streams.settings import Settings
from tests.conftest import or_skip
from tests.kafka import JarKafka
from tests.play import play
from tests.traffic import Traffic
from tests.workers import Fleet, Worker

pytestmark = [pytest.mark.kafka, pytest.mark.slow, pytest.mark.timeout(300)]
STORE_PASSWORD, USER, PASSWORD = "changeit", "anna", "the-shop's-own"


def certificate(directory: Path) -> tuple[Path, Path]:
    """The broker's key store, and its certificate as PEM."""
    store, pem = directory / "broker.p12", directory / "broker.pem"
    access = ["-keystore", str(store), "-storetype", "PKCS12", "-storepass", STORE_PASSWORD, "-alias", "broker"]
    key = ["-keyalg", "RSA", "-keysize", "2048", "-dname", "CN=127.0.0.1", "-ext", "san=ip:127.0.0.1,dns:localhost"]
    subprocess.run(["keytool", "-genkeypair", *access, *key, "-validity", "2"], check=True, capture_output=True)
    subprocess.run(["keytool", "-exportcert", "-rfc", *access, "-file", str(pem)], check=True, capture_output=True)
    return store, pem


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A deployment on a broker of its own, over TLS and SASL."""
    directory = tmp_path_factory.mktemp("secured")
    store, pem = certificate(directory)
    login = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
    listener = {
        "ssl.keystore.location": str(store),
        "ssl.keystore.password": STORE_PASSWORD,
        "sasl.enabled.mechanisms": "PLAIN",
        "plain.sasl.jaas.config": login,
    }
    broker = or_skip(lambda: JarKafka(secure=listener))
    try:
        broker.start()
        yield Settings(
            bootstrap_servers=broker.secure_servers,
            security_protocol="SASL_SSL",
            sasl_username=USER,
            sasl_password=SecretStr(PASSWORD),
            ssl_cafile=pem,
            topic_prefix="shop.",
            partitions=2,
            gap_ms=60_000,
            grace_ms=10_000,
            ahead_ms=600_000,
            clock="log",
            state_dir=directory / "state",
        )
    finally:
        broker.stop()


def test_all_roles_over_tls_with_a_password(secured: Settings, tiny_bundle: Path, tmp_path: Path) -> None:
    """Topics, producers, consumers, transactions, restores and tails: every client that there is."""
    assert topics.create(secured)
    topics.require(secured)
    settings = secured.but(bundle=tiny_bundle)
    with Fleet([Worker(settings, tmp_path / "w")]) as fleet:
        fleet.start()
        fleet.workers[0].wait_ready()
        outcome = play(settings, fleet, Traffic(seed=3, events=2_000), predicted=True)
        assert not outcome.faults, "\n".join(outcome.faults[:10]) + fleet.workers[0].tail()
    ((seen, _),) = watching.watch(secured, from_beginning=True, count=1)
    assert seen.records == 1


@pytest.mark.parametrize("change", [{"sasl_password": SecretStr("wrong")}, {"ssl_cafile": None}])
def test_a_wrong_password_or_an_unknown_authority_is_said(secured: Settings, change: dict[str, Any]) -> None:
    known = {name: getattr(secured, name) for name in secured.model_fields_set} | change
    with pytest.raises(BrokerUnavailable, match="check the security settings"):
        topics.wait_for_broker(Settings(**known), 3.0)
