"""The way to replicas: no unbounded wait without one, and another is asked when one's engine is dead."""

from __future__ import annotations

import asyncio

import pytest

from serving.engine.asks import Ask, Fault, Reply
from serving.engine.link import HandleLink
from serving.engine.queueing import EngineDead, Overloaded


class Response:
    """What a handle's `remote` gives."""

    def __init__(self, made):
        self.made, self.cancelled = made, False

    def __await__(self):
        return self.made().__await__()

    def cancel(self):
        self.cancelled = True


class Method:
    def __init__(self, function):
        self.function, self.responses = function, []

    def remote(self, *args):
        self.responses.append(Response(lambda: self.function(*args)))
        return self.responses[-1]


class Handle:
    def __init__(self, answer, status):
        self.answer, self.find, self.status = Method(answer), Method(answer), Method(status)


async def never(*_):
    await asyncio.Event().wait()


def ask(residues: int = 4) -> Ask:
    return Ask("embed", "tiny@1", ("M" * residues,))


def quick(handle, **options) -> HandleLink:
    link = HandleLink(handle, **options)
    link.PROBE_S = link.SILENT_S = link.TICK_S = 0.05
    return link


@pytest.mark.anyio
async def test_without_a_replica_a_request_is_refused_within_the_queue_time():
    handle = Handle(never, never)
    link = quick(handle, patience_s=0.3)
    with pytest.raises(Overloaded) as caught:
        await asyncio.wait_for(link.answer(ask()), 10)
    assert caught.value.status == 429 and caught.value.retry_after
    assert all(r.cancelled for r in handle.answer.responses)
    assert not link._waiting


@pytest.mark.anyio
async def test_without_a_replica_what_waits_is_bounded():
    link = quick(Handle(never, never), patience_s=60, limit=10)
    first = asyncio.create_task(link.answer(ask(8)))
    while not link._silent:
        await asyncio.sleep(0.02)
    with pytest.raises(Overloaded):
        await asyncio.wait_for(link.answer(ask(8)), 10)
    first.cancel()


@pytest.mark.anyio
async def test_a_slow_answer_of_a_living_replica_is_waited_for():
    async def slow(_):
        await asyncio.sleep(0.6)
        return Reply(scores=[1.0])

    async def status():
        return {}

    link = quick(Handle(slow, status), patience_s=0.1)
    assert (await link.answer(ask())).scores == [1.0]


@pytest.mark.anyio
async def test_another_replica_is_asked_when_ones_engine_is_dead():
    replies = [Reply(fault=Fault.of(EngineDead())), Reply(scores=[2.0])]

    async def answer(_):
        return replies.pop(0)

    assert (await quick(Handle(answer, never)).answer(ask())).scores == [2.0]


@pytest.mark.anyio
async def test_when_every_engine_is_dead_it_is_said():
    async def answer(_):
        return Reply(fault=Fault.of(EngineDead()))

    with pytest.raises(EngineDead):
        await quick(Handle(answer, never)).answer(ask())


def test_errors_of_the_device_are_told_from_others():
    import torch

    from serving.engine.host import device_failed

    assert device_failed(RuntimeError("CUDA error: device-side assert triggered"))
    assert not device_failed(torch.OutOfMemoryError("CUDA out of memory"))
    assert not device_failed(RuntimeError("shapes do not fit"))
    assert not device_failed(ValueError("CUDA error"))
