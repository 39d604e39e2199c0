"""What names a bundle."""

import msgspec


class ModelRef(msgspec.Struct, frozen=True):
    """A published bundle: its readable version, `sha256:` and the hex digest of its manifest, and the place it is at.

    `bytes`: all its files together.
    """

    version: str
    digest: str
    uri: str
    bytes: int
