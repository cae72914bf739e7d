"""Flow control through Ray Serve, which has none of its own.

Serve's proxy reads a body as fast as it comes and keeps what the replica has not fetched; the replica fetches as fast as it
can; and an answer is handed on whether anybody reads it or not. An upload that outruns the disk and a reader that stalls
would grow in memory by the size of the file. Here each of these three queues waits when it holds `HELD` bytes. The names
that are patched are Serve's own: a Ray that lacks one is refused, and tests look whether memory stays bounded.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bioseq.errors import ResourceError

HELD = 4 << 20  # bytes
OBJECTS = 4  # batches of an answer that a replica may be ahead of its proxy
IN_PROXY = "serving.cluster.pace:in_proxy"  # for RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH
_sent_to: ContextVar[Any] = ContextVar("sent_to", default=None)


def in_proxy() -> list[Any]:
    """Called by Serve in each of its HTTP proxies as it starts; middlewares are what it asks for, and there are none."""
    from ray.serve._private.request_router import replica_wrapper

    _count_queues()
    kind = _known(replica_wrapper, "ActorReplicaWrapper", "send_request_python")
    if not getattr(kind, "bioseq_paced", False):
        plain = kind.__init__

        def init(self: Any, actor_handle: Any) -> None:
            plain(self, _Handle(actor_handle))

        kind.__init__, kind.bioseq_paced = init, True
    return []


def in_replica() -> None:
    """Called by the ingress as it starts."""
    from ray.serve._private import http_util

    _count_queues()
    kind = _known(http_util, "ASGIReceiveProxy", "fetch_until_disconnect", "queue", "__call__")
    if getattr(kind, "bioseq_paced", False):
        return
    plain_init, plain_call = kind.__init__, kind.__call__

    def init(self: Any, scope: Any, metadata: Any, fetch: Any) -> None:
        self.unread, self.room = 0, asyncio.Event()

        async def when_there_is_room(asked: Any) -> bytes:
            while self.unread > HELD:
                self.room.clear()
                await self.room.wait()
            data = await fetch(asked)
            self.unread += len(data)
            return data

        plain_init(self, scope, metadata, when_there_is_room)

    async def call(self: Any) -> Any:
        message = await plain_call(self)
        if self.queue.empty():
            self.unread = 0
            self.room.set()
        return message

    kind.__init__, kind.__call__, kind.bioseq_paced = init, call, True


def paced(app: ASGIApp) -> ASGIApp:
    """The application, each of whose sends waits until the proxy has fetched what was sent, but for a little."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def waiting(message: Message) -> None:
            await send(message)
            queue = _sent_to.get()
            if queue is not None:
                await _room(queue)

        await app(scope, receive, waiting)

    return run


def _known(module: Any, name: str, *methods: str) -> Any:
    kind = getattr(module, name, None)
    if kind is None or any(not hasattr(kind, method) for method in methods):
        raise ResourceError(
            "this version of Ray Serve moves bodies in a way that bioseq does not know, and cannot bound.",
            hint="Install the Ray that constraints.txt names.",
        )
    return kind


def _count_queues() -> None:
    from ray.serve._private import http_util

    kind = _known(http_util, "MessageQueue", "put_nowait", "get_messages_nowait", "close", "__call__")
    if getattr(kind, "bioseq_paced", False):
        return
    put, take, close, call = kind.put_nowait, kind.get_messages_nowait, kind.close, kind.__call__

    def put_nowait(self: Any, message: Any) -> None:
        put(self, message)
        body = message.get("body") if isinstance(message, dict) else None
        self.held = getattr(self, "held", 0) + len(body or b"")
        _sent_to.set(self)

    def get_messages_nowait(self: Any) -> Any:
        messages = take(self)
        _make_room(self)
        return messages

    def closed(self: Any) -> None:
        close(self)
        _make_room(self)

    async def send(self: Any, message: Any) -> None:
        await call(self, message)
        await _room(self)

    kind.put_nowait, kind.get_messages_nowait, kind.close, kind.__call__ = (
        put_nowait, get_messages_nowait, closed, send,
    )  # fmt: skip
    kind.bioseq_paced = True


async def _room(queue: Any) -> None:
    while getattr(queue, "held", 0) > HELD:
        queue.room = asyncio.Event()
        await queue.room.wait()


def _make_room(queue: Any) -> None:
    queue.held = 0
    room = getattr(queue, "room", None)
    if room is not None:
        room.set()


class _Handle:
    """A replica's handle whose streams do not run ahead of their reader."""

    def __init__(self, handle: Any):
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handle, name)
        if name in ("handle_request_with_rejection", "handle_request_streaming"):
            return _Stream(found)
        return found


class _Stream:
    def __init__(self, method: Any):
        self._method = method

    def options(self, **options: Any) -> Any:
        return self._method.options(**options, _generator_backpressure_num_objects=OBJECTS)
