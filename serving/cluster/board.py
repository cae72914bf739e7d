"""A small actor that all processes of the service report to: their metrics, their requests in flight. It also
tells them when the service is stopping."""

from __future__ import annotations

import time
from typing import Any

NAME, NAMESPACE = "bioseq-board", "bioseq"
_FORGET_S = 30.0


class Board:
    """State of the service; lost on a restart and told again within a second."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[float, str]] = {}
        self._in_flight: dict[str, tuple[float, int]] = {}
        self._draining = False

    def push(self, process: str, text: str, in_flight: int | None = None) -> bool:
        """Report; the answer is whether the service is stopping."""
        now = time.monotonic()
        self._texts[process] = (now, text)
        if in_flight is not None:
            self._in_flight[process] = (now, in_flight)
        return self._draining

    def collect(self) -> dict[str, str]:
        """The last text of every process that reported within the last 30 s."""
        now = time.monotonic()
        self._texts = {p: v for p, v in self._texts.items() if now - v[0] < _FORGET_S}
        return {p: text for p, (_, text) in self._texts.items()}

    def drain(self, on: bool = True) -> None:
        self._draining = on

    def in_flight(self, since_s: float) -> tuple[int, int]:
        """Requests in flight, and ingresses that have reported within the last `since_s`."""
        now = time.monotonic()
        fresh = [n for at, n in self._in_flight.values() if now - at < since_s]
        return sum(fresh), len(fresh)


def open_board() -> Any:
    """The board's actor handle; it is made if it is not there. Needs a running Ray."""
    import ray

    return (
        ray.remote(Board)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
        )
        .remote()
    )


class RemoteBoard:
    """What the ingress asks."""

    def __init__(self, actor: Any, process: str):
        self.actor, self.process = actor, process

    async def collect(self) -> dict[str, str]:
        import asyncio

        try:
            texts = await asyncio.wait_for(self.actor.collect.remote(), 2.0)
        except Exception:
            return {}
        texts.pop(self.process, None)
        return texts
