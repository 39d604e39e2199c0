"""The errors of this room."""

from collections.abc import Iterable


class TrainingError(Exception):
    """Options or files that nothing can be trained or judged with; the message says what, where and what to do."""

    exit_code = 2


def at_least_one(options: object, names: Iterable[str]) -> None:
    """Raises TrainingError for the first of these numbers that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise TrainingError(f"{name} is {value}, but must be at least 1.")


class TooFewClicks(TrainingError):
    """The clicks do not tell which items belong together."""


class ArchiveUnusable(TrainingError):
    """The archive's directory is in use, or holds something that this version does not write."""

    exit_code = 6


class ArchiveUnwritable(TrainingError):
    """A write to the archive failed. Nothing is lost: the next start goes on from the last commit."""

    exit_code = 7
