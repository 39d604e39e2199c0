"""The settings of a connection in the words of each Kafka client, so that SASL and TLS reach all of them."""

import ssl
from typing import Any

from streams.errors import UsageError
from streams.settings import Settings


def librdkafka(settings: Settings) -> dict[str, Any]:
    """For `confluent_kafka`."""
    config: dict[str, Any] = {
        "bootstrap.servers": settings.bootstrap_servers,
        "security.protocol": settings.security_protocol,
    }
    if _uses_sasl(settings):
        user, password = _credentials(settings)
        config |= {"sasl.mechanism": settings.sasl_mechanism, "sasl.username": user, "sasl.password": password}
    if _uses_tls(settings):
        paths = {
            "ssl.ca.location": settings.ssl_cafile,
            "ssl.certificate.location": settings.ssl_certfile,
            "ssl.key.location": settings.ssl_keyfile,
        }
        config |= {name: str(path) for name, path in paths.items() if path is not None}
    return config


def kafka_python(settings: Settings) -> dict[str, Any]:
    """For `kafka` (kafka-python): consumers, producers and the admin client."""
    config = _python(settings)
    if _uses_tls(settings):
        paths = {
            "ssl_cafile": settings.ssl_cafile,
            "ssl_certfile": settings.ssl_certfile,
            "ssl_keyfile": settings.ssl_keyfile,
        }
        config |= {name: str(path) for name, path in paths.items() if path is not None}
    return config


def aiokafka(settings: Settings) -> dict[str, Any]:
    """For `aiokafka`, which wants a ready TLS context. Raises `UsageError` if a certificate cannot be read."""
    config = _python(settings)
    if _uses_tls(settings):
        config["ssl_context"] = tls_context(settings)
    return config


def tls_context(settings: Settings) -> ssl.SSLContext:
    """The TLS context of the settings' files. Raises `UsageError` if one cannot be read."""
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        if settings.ssl_certfile is not None:
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"TLS: {error}: check SSL_CAFILE, SSL_CERTFILE and SSL_KEYFILE (PEM files)") from error
    return context


def _python(settings: Settings) -> dict[str, Any]:
    """What kafka-python and aiokafka name alike."""
    config: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers.split(","),
        "security_protocol": settings.security_protocol,
    }
    if _uses_sasl(settings):
        user, password = _credentials(settings)
        config |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": user,
            "sasl_plain_password": password,
        }
    return config


def _uses_sasl(settings: Settings) -> bool:
    return settings.security_protocol.startswith("SASL")


def _uses_tls(settings: Settings) -> bool:
    return settings.security_protocol.endswith("SSL")


def _credentials(settings: Settings) -> tuple[str, str]:
    if settings.sasl_username is None or settings.sasl_password is None:
        protocol = settings.security_protocol
        raise UsageError(f"SECURITY_PROTOCOL {protocol} needs a user: set SASL_USERNAME and SASL_PASSWORD")
    return settings.sasl_username, settings.sasl_password.get_secret_value()
