"""A model that answers in the worker's own process: tests need no other."""

from collections.abc import Callable, Sequence

from models.visit import Visit
from streams.forecasting import Answered, Forecasting, Loaded, Model


class InProcess:
    """What `ModelProcess` is to the role `predict`, without the process."""

    def __init__(
        self, model: Model, is_out_of_memory: Callable[[BaseException], bool] = lambda error: False, retries: int = 1
    ) -> None:
        self._forecasting = Forecasting(model, is_out_of_memory, retries)
        self.loaded = Loaded(model.version, model.digest, model.router_digest)

    async def answer(self, visits: Sequence[Visit]) -> Answered:
        """One answer for each visit, in order."""
        return self._forecasting.answer(visits)

    async def close(self) -> None:
        """There is nothing to end."""
