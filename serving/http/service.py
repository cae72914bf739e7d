"""What the routes work with, hung on the application as `app.state.service`."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from serving.database.base import Database
from serving.database.keys import Keys
from serving.engine.catalogue import Catalogue
from serving.engine.link import Link, SearchLink
from serving.http.auth import Authorizer
from serving.settings import Settings
from serving.telemetry.metrics import IngressMetrics
from serving.telemetry.tracing import Tracing


@dataclass
class Service:
    settings: Settings
    link: Link
    searches: SearchLink
    catalogue: Catalogue
    database: Database
    board: Any = None
    metrics: IngressMetrics = field(default_factory=IngressMetrics)
    tracing: Tracing = field(default_factory=Tracing)
    extras: dict[str, Any] = field(default_factory=dict)  # what other rooms (jobs, files) keep here
    refreshing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.authorizer = Authorizer(Keys(self.database), self.settings)

    async def refresh(self) -> None:
        """See what is in the registry now."""
        async with self.refreshing:
            await asyncio.to_thread(self.catalogue.refresh)


def service_of(request: Request) -> Service:
    return request.app.state.service
