"""Every error that Browsecast raises, as one tree, and the exit code that ends a command with it.

BrowsecastError            1   something a person must mend; the message says what, where and how
├── UsageError             2   a wrong option, file or log
├── WrongTopics            3   topics are missing or set up wrongly
├── BrokerUnavailable      4   no broker answered in time
├── BundleRefused          5   a bundle is damaged, incomplete or of an unknown kind (models.manifest)
├── StateUnusable          6   the state directory is in use, full or damaged
├── StateUnwritable        7   a transaction or a write failed; the next start repeats it from the last commit
├── Stalled                8   lag and no progress: the watchdog ended the worker
├── ModelRefused           5   what the model's process said when it could not load its bundle; 2 for a missing device
└── ModelLost              1   the model's process died again and again
"""


class BrowsecastError(Exception):
    """The root: catch this to catch all."""

    exit_code = 1


class UsageError(BrowsecastError):
    """A wrong option, file or log."""

    exit_code = 2


class WrongTopics(BrowsecastError):
    """Topics are missing or set up wrongly."""

    exit_code = 3


class BrokerUnavailable(BrowsecastError):
    """No broker answered in time."""

    exit_code = 4


class StateUnusable(BrowsecastError):
    """The state directory is in use by another worker, full or damaged."""

    exit_code = 6


class StateUnwritable(BrowsecastError):
    """A transaction or a write failed. Nothing is lost: the next start repeats it from the last commit."""

    exit_code = 7


class Stalled(BrowsecastError):
    """Lag and no progress for too long."""

    exit_code = 8


class ModelRefused(BrowsecastError):
    """The model's process could not load its bundle; `exit_code` is that of its error."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class ModelLost(BrowsecastError):
    """The model's process died again and again."""
