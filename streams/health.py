"""The worker's HTTP port: `/live` (restart me?), `/ready` (am I working?) and `/metrics` (Prometheus)."""

from collections.abc import Callable

from aiohttp import web

from streams.errors import UsageError
from streams.metrics import Metrics
from streams.settings import Settings

Reasons = dict[str, str]


class Health:
    """Serves the three pages of one worker.

    `ready` returns why the worker is not ready, by name, and nothing when it is; `live` returns why the worker should
    be restarted, or None. Both are called at each request and must not block.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        ready: Callable[[], Reasons],
        live: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._ready = ready
        self._live = live
        app = web.Application()
        app.add_routes(
            [
                web.get("/live", self._answer_live),
                web.get("/ready", self._answer_ready),
                web.get("/metrics", self._answer_metrics),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)

    async def start(self) -> int:
        """Listen, and return the port (settings.port 0 takes a free one). UsageError if it cannot listen there."""
        host, port = self._settings.host, self._settings.port
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            await self._runner.cleanup()
            raise UsageError(
                f"cannot listen on {host}:{port} for /live, /ready and /metrics: {error.strerror or error}. Another "
                "worker may have it: give each worker its own with --port or BROWSECAST_PORT (0 takes a free one)"
            ) from error
        taken: int = self._runner.addresses[0][1]
        return taken

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _answer_live(self, _: web.Request) -> web.Response:
        reason = self._live()
        return web.json_response({"live": reason is None, "reason": reason}, status=200 if reason is None else 503)

    async def _answer_ready(self, _: web.Request) -> web.Response:
        reasons = self._ready()
        return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)

    async def _answer_metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self._metrics.render(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )
