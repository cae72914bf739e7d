"""The application: routes, error answers and limits put together.

`create_app` makes the ASGI application around any `Link`; `in_process` one with its engine inside, for tests and
for embedding.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse

from bioseq.errors import BioseqError
from bioseq.version import __version__
from serving.database.base import Database
from serving.engine.catalogue import Catalogue
from serving.engine.link import LocalLink
from serving.engine.searches import Searches
from serving.http import error_responses
from serving.http.limits import RequestLimits
from serving.http.routes import (
    campaigns,
    embed,
    estimate,
    health,
    homologs,
    jobs,
    keys,
    models,
    predict,
    search,
    variants,
)
from serving.http.routes.body import Route
from serving.http.schemas import common
from serving.http.schemas.models import RegisterRequest
from serving.http.service import Service
from serving.page import routes as page
from serving.problems import Problem
from serving.settings import Settings
from serving.telemetry import logs
from serving.telemetry.metrics import EngineMetrics

# Each has a `router`; and some `attach(service)`, an async context manager that runs while the application does
# (background work, what they keep in `service.extras`).
ROUTES: tuple[Any, ...] = (
    embed, predict, variants, search, homologs, models, estimate, health, jobs, campaigns, keys, page,
)  # fmt: skip
_DESCRIPTION = """Protein language models: embeddings, property predictions and variant scores.

Errors are problem documents (RFC 9457) with a stable dotted `code`; `/v1/embeddings` answers errors in
OpenAI's shape. Sequences never appear in errors, logs or metrics."""


def create_app(service: Service) -> RequestLimits:
    """The ASGI application of a service."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for module in ROUTES:
                if hasattr(module, "attach"):
                    await stack.enter_async_context(module.attach(service))
            task = asyncio.create_task(_background(service))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await asyncio.to_thread(service.tracing.stop)
                with contextlib.suppress(BioseqError):
                    await asyncio.to_thread(service.authorizer.flush)

    app = FastAPI(
        title="bioseq",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for kind, handler in (
        (Problem, error_responses.on_problem),
        (BioseqError, error_responses.on_bioseq_error),
        (RequestValidationError, error_responses.on_validation),
        (HTTPException, error_responses.on_http),
        (Exception, error_responses.on_unforeseen),
    ):
        app.add_exception_handler(kind, handler)
    for module in ROUTES:
        app.include_router(module.router)
    app.include_router(_docs())
    _complete_openapi(app)
    if service.settings.traces:
        service.tracing.start(app)
    return RequestLimits(app, service.settings, service.metrics)


async def _background(service: Service) -> None:
    """See changes of the registry, write down usage."""
    beat = 0
    while True:
        await asyncio.sleep(service.settings.poll_s)
        beat += 1
        try:
            await service.refresh()
            if beat % 5 == 0:
                await asyncio.to_thread(service.authorizer.flush)
        except Exception as error:
            logs.trouble("background", error)


def _docs() -> APIRouter:
    """The documentation page, which loads nothing from other hosts."""
    router = APIRouter(route_class=Route)
    page = (Path(__file__).parent / "docs_page.html").read_text("utf-8")

    @router.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page)

    return router


def _complete_openapi(app: FastAPI) -> None:
    """Schemas that are named by reference only, and 422 as the problem document that it is."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = plain()
            schemas = schema["components"]["schemas"]
            for model in (common.Problem, common.OpenAIError, RegisterRequest):
                made = model.model_json_schema(ref_template="#/components/schemas/{model}")
                schemas.update(made.pop("$defs", {}))
                schemas[model.__name__] = made
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


class LocalBoard:
    """Metrics of an engine in this process."""

    def __init__(self, host: Any, metrics: EngineMetrics):
        self.host, self.metrics = host, metrics

    async def collect(self) -> dict[str, str]:
        return {"engine": self.metrics.text(self.host.engine.status()["queued_tokens"])}


@contextlib.asynccontextmanager
async def in_process(
    settings: Settings | None = None, *, registry: Any = None, load: Any = None
) -> AsyncIterator[RequestLimits]:
    """The whole service in this process, without Ray: `async with in_process(Settings(...)) as app`, and send
    requests through `httpx.ASGITransport(app)`. Its `service` is `app.service`."""
    from bioseq.bundles.registry import Registry
    from serving.engine.host import Host

    settings = settings or Settings()
    if settings.log_file:
        logs.to_file(settings.log_file)
    database = Database(settings.database)
    await asyncio.to_thread(database.upgrade)
    catalogue = Catalogue(registry or Registry(settings.registry), settings.model)
    observer = EngineMetrics()
    host = Host(settings, catalogue, load=load, observer=observer)
    searches = Searches(settings, registry=catalogue.registry)
    await host.start()
    try:
        await searches.start()
        board = LocalBoard(host, observer)
        app = create_app(Service(settings, LocalLink(host), searches, catalogue, database, board))
        async with app.lifespan():
            yield app
    finally:
        host.engine.stop()
        searches.engine.stop()
        database.dispose()
