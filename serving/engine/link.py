"""How the ingress reaches engines: in this process, or through a Ray Serve handle. Nothing else differs."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any, Protocol

from serving.engine.asks import Ask, Reply
from serving.engine.queueing import EngineDead
from serving.engine.searches import SearchAsk, SearchReply

if TYPE_CHECKING:
    from serving.engine.host import Host

ATTEMPTS = 4  # an ask that kills its engine so often is given up: it is the ask's fault


class Link(Protocol):
    async def answer(self, ask: Ask) -> Reply: ...
    async def status(self) -> dict[str, Any]: ...


class SearchLink(Protocol):
    """How the ingress reaches what searches for homologs."""

    async def find(self, ask: SearchAsk) -> SearchReply: ...
    async def status(self) -> dict[str, Any]: ...


class LocalLink:
    """The host in this process."""

    def __init__(self, host: Host):
        self.host = host

    async def answer(self, ask: Ask) -> Reply:
        return await self.host.answer(ask)

    async def status(self) -> dict[str, Any]:
        self.host.engine.check()
        return self.host.status()


class HandleLink:
    """Replicas behind a Serve handle. An ask whose replica died is asked again: asks are pure. Raises
    `EngineDead` when no replica has answered within `recovery_s`."""

    def __init__(self, handle: Any, *, recovery_s: float = 60.0):
        self._answer, self._find, self._status = handle.answer, handle.find, handle.status
        self.recovery_s = recovery_s

    async def answer(self, ask: Ask) -> Reply:
        return await self._call(self._answer, ask, attempts=ATTEMPTS)

    async def status(self) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._call(self._status, attempts=1), 2.0)
        except TimeoutError:
            raise EngineDead("no engine answers.") from None

    async def find(self, ask: SearchAsk) -> SearchReply:
        return await self._call(self._find, ask, attempts=ATTEMPTS)

    async def _call(self, method: Any, *args: Any, attempts: int) -> Any:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        until = time.monotonic() + self.recovery_s
        while True:
            attempts -= 1
            try:
                return await method.remote(*args)
            except BackPressureError:
                from serving.engine.queueing import Overloaded

                raise Overloaded("too many requests wait for an engine.", 2.0) from None
            except (ActorDiedError, ActorUnavailableError, RayActorError, DeploymentUnavailableError):
                pass
            except RayServeException:
                pass
            if attempts <= 0 or time.monotonic() > until:
                raise EngineDead()
            await asyncio.sleep(0.2)
