"""How it is about the items that a model knows, as its process tells the worker."""

import msgspec


class Figures(msgspec.Struct, array_like=True):
    """Items known and available, clicks in the window, records of `items` that could not be read, texts that wait."""

    known: int
    available: int
    clicks: int
    rejected: int
    waiting: int
