"""How the ingress reaches engines: in this process, or through a Ray Serve handle. Nothing else differs."""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import TYPE_CHECKING, Any, Protocol

from serving.engine.asks import Ask, Reply
from serving.engine.queueing import EngineDead, Overloaded
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
        await self.host.check()
        return self.host.status()


class HandleLink:
    """Replicas behind a Serve handle. An ask whose replica died, or says that its engine has, is asked again: asks are
    pure. Raises `EngineDead` when no replica has answered within `recovery_s`.

    With no replica at all, Ray's router would let asks wait without bound. So while asks wait and nothing is heard,
    replicas are asked for their status; if none answers, what has waited `patience_s` is refused (429), and new asks
    are as soon as `limit` residues wait.
    """

    PROBE_S, SILENT_S, TICK_S = 2.0, 2.0, 0.5

    def __init__(
        self, handle: Any, *, recovery_s: float = 60.0, patience_s: float = 30.0, limit: int = 4_000_000
    ):
        self._answer, self._find, self._status = handle.answer, handle.find, handle.status
        self.recovery_s, self.patience_s, self.limit = recovery_s, patience_s, limit
        self._waiting: dict[int, tuple[float, int, asyncio.Timeout]] = {}
        self._numbers = itertools.count()
        self._heard = 0.0
        self._silent = False  # the last probe was not answered
        self._watcher: asyncio.Task[None] | None = None

    async def answer(self, ask: Ask) -> Reply:
        return await self._bounded(self._answer, ask)

    async def find(self, ask: SearchAsk) -> SearchReply:
        return await self._bounded(self._find, ask)

    async def status(self) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(self._call(self._status, attempts=1), self.PROBE_S)
        except TimeoutError:
            raise EngineDead("no engine answers.") from None

    async def _bounded(self, method: Any, ask: Ask | SearchAsk) -> Any:
        size = sum(map(len, ask.sequences))
        waiting = sum(n for _, n, _ in self._waiting.values()) if self._silent else 0
        if waiting and waiting + size > self.limit:
            raise Overloaded(f"no engine is running, and {waiting} residues wait for one.", 5.0)
        number = next(self._numbers)
        try:
            async with asyncio.timeout(None) as limit:
                self._waiting[number] = (time.monotonic(), size, limit)
                if self._watcher is None or self._watcher.done():
                    self._watcher = asyncio.create_task(self._watch())
                return await self._call(method, ask, attempts=ATTEMPTS)
        except TimeoutError:
            raise Overloaded("no engine is running; one may be starting.", 5.0) from None
        finally:
            del self._waiting[number]

    async def _watch(self) -> None:
        """While asks wait."""
        while self._waiting:
            await asyncio.sleep(self.TICK_S)
            if time.monotonic() - self._heard < self.SILENT_S:
                self._silent = False
                continue
            try:
                await self.status()
                self._silent = False
            except EngineDead:
                self._silent = True
                now, loop = time.monotonic(), asyncio.get_running_loop()
                for began, _, limit in self._waiting.values():
                    if now - began > self.patience_s:
                        limit.reschedule(loop.time())

    async def _call(self, method: Any, *args: Any, attempts: int) -> Any:
        from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException

        until = time.monotonic() + self.recovery_s
        while True:
            attempts -= 1
            response = method.remote(*args)
            try:
                reply = await response
                self._heard = time.monotonic()
                fault = getattr(reply, "fault", None)
                if fault is None or fault.code != EngineDead.CODE:
                    return reply
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError:
                raise Overloaded("too many requests wait for an engine.", 2.0) from None
            except (ActorDiedError, ActorUnavailableError, RayActorError, DeploymentUnavailableError):
                pass
            except RayServeException:
                pass
            if attempts <= 0 or time.monotonic() > until:
                raise EngineDead()
            await asyncio.sleep(0.2)
