"""The errors of this room."""


class TrainingError(Exception):
    """Options or files that nothing can be trained or judged with; the message says what, where and what to do."""

    exit_code = 2


class TooFewClicks(TrainingError):
    """The clicks do not tell which items belong together."""


class ArchiveUnusable(TrainingError):
    """The archive's directory is in use, or holds something that this version does not write."""

    exit_code = 6


class ArchiveUnwritable(TrainingError):
    """A write to the archive failed. Nothing is lost: the next start goes on from the last commit."""

    exit_code = 7
