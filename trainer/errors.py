"""The one error of this room."""


class TrainingError(Exception):
    """Options or files that nothing can be trained or judged with; the message says what, where and what to do."""

    exit_code = 2
