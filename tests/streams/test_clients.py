import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer
from kafka import KafkaProducer
from pydantic import SecretStr

from streams import clients
from streams.errors import UsageError
from streams.settings import Settings

SASL: dict[str, Any] = {
    "sasl_mechanism": "SCRAM-SHA-512",
    "sasl_username": "anna",
    "sasl_password": SecretStr("secret"),
}


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate and its key."""
    folder = tmp_path_factory.mktemp("pem")
    certificate, key = folder / "c.pem", folder / "k.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    try:
        files = ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run([*command, *files, "-subj", "/CN=test", "-days", "1"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"openssl made no certificate: {error}")
    return certificate, key


def test_plain_connection_has_no_secrets() -> None:
    settings = Settings(bootstrap_servers="a:1,b:2", sasl_username="anna")
    assert clients.librdkafka(settings) == {"bootstrap.servers": "a:1,b:2", "security.protocol": "PLAINTEXT"}
    assert clients.kafka_python(settings) == {"bootstrap_servers": ["a:1", "b:2"], "security_protocol": "PLAINTEXT"}
    assert clients.aiokafka(settings) == clients.kafka_python(settings)


def test_sasl_reaches_every_client() -> None:
    settings = Settings(security_protocol="SASL_PLAINTEXT", **SASL)
    python = {
        "bootstrap_servers": ["127.0.0.1:9092"],
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "anna",
        "sasl_plain_password": "secret",
    }
    assert clients.kafka_python(settings) == python
    assert clients.aiokafka(settings) == python
    assert clients.librdkafka(settings) == {
        "bootstrap.servers": "127.0.0.1:9092",
        "security.protocol": "SASL_PLAINTEXT",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "anna",
        "sasl.password": "secret",
    }


def test_tls_reaches_every_client(pem: tuple[Path, Path]) -> None:
    certificate, key = pem
    files: dict[str, Any] = {"ssl_cafile": certificate, "ssl_certfile": certificate, "ssl_keyfile": key}
    settings = Settings(security_protocol="SASL_SSL", **SASL, **files)
    librdkafka = clients.librdkafka(settings)
    assert librdkafka["ssl.ca.location"] == librdkafka["ssl.certificate.location"] == str(certificate)
    assert librdkafka["ssl.key.location"] == str(key)
    python = clients.kafka_python(settings)
    assert {name: python[name] for name in files} == {name: str(path) for name, path in files.items()}
    context = clients.aiokafka(settings)["ssl_context"]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert [authority["subject"] for authority in context.get_ca_certs()] == [((("commonName", "test"),),)]


def test_clients_know_the_names(pem: tuple[Path, Path]) -> None:
    certificate, key = pem
    files: dict[str, Any] = {"ssl_cafile": certificate, "ssl_certfile": certificate, "ssl_keyfile": key}
    settings = Settings(security_protocol="SASL_SSL", **SASL, **files)
    Producer(clients.librdkafka(settings))  # raises on an unknown name or a file that cannot be used
    assert set(clients.kafka_python(settings)) <= set(KafkaProducer.DEFAULT_CONFIG)


def test_sasl_without_a_user_is_refused() -> None:
    with pytest.raises(UsageError, match="SASL_USERNAME and SASL_PASSWORD"):
        clients.aiokafka(Settings(security_protocol="SASL_SSL"))


def test_unreadable_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SSL_CAFILE"):
        clients.aiokafka(Settings(security_protocol="SSL", ssl_cafile=tmp_path / "none.pem"))
