"""Every error that Browsecast raises, as one tree, and the exit code that ends a command with it.

BrowsecastError            1   something a person must mend; the message says what, where and how
├── UsageError             2   a wrong option, file or log
├── WrongTopics            3   topics are missing or set up wrongly
├── BrokerUnavailable      4   no broker answered in time
├── BundleRefused          5   a bundle is damaged, incomplete or of an unknown kind
├── StateUnusable          6   the state directory is in use, full or damaged
├── StateUnwritable        7   a transaction or a write failed; the next start repeats it from the last commit
└── Stalled                8   lag and no progress: the watchdog ended the worker
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
