"""The Ray Serve deployments: an ingress that speaks HTTP and engine replicas that hold predictors.

One engine replica a GPU, or a fraction of the CPUs on a laptop. The ingress keeps no state that another could
not take over; Serve restarts either, and the ingress asks again what a dead engine left unanswered.
"""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from bioseq.errors import ResourceError
from serving.cluster import pace
from serving.settings import Settings
from serving.telemetry import logs

APP = "bioseq"
MAX_ONGOING = 10_000  # our own queue decides what is too much, by tokens and time


def shut_inner_port() -> None:
    """Serve opens a gRPC port in every replica, on all addresses, for a faster transport between deployments. It
    unpickles whatever it is sent, and no token guards it: whoever reaches it runs code here. Our handles go Ray's
    own, guarded way, so it stays shut; unless TLS asks for the cluster's certificates, or that transport was chosen.
    Raises `ResourceError` for a Ray that opens it in another way.
    """
    from ray.serve._private import replica

    if _inner_port_wanted():
        return
    if not hasattr(replica, _OPENS):
        raise ResourceError(
            "this version of Ray Serve opens its inner port in a way that bioseq does not know, and cannot shut.",
            hint="Install the Ray that constraints.txt names, or set RAY_USE_TLS with the cluster's certificates.",
        )
    setattr(replica, _OPENS, lambda server, address: 0)


_OPENS = "add_port_to_grpc_server"


def _inner_port_wanted() -> bool:
    chosen = os.environ.get("RAY_SERVE_USE_GRPC_BY_DEFAULT") == "1"
    return chosen or os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def check_inner_port(listeners: Iterable[tuple[str, int]] | None = None) -> None:
    """Raise `ResourceError` if this replica listens where only the inner port would: on all addresses of IPv6, where Ray's
    own ports never are. `listeners` are (address, port), by default this process's. Once it is seen shut it stays so."""
    if _inner_port_wanted():
        return
    for address, port in _listeners() if listeners is None else listeners:
        if address == "::":
            raise ResourceError(
                f"Ray Serve's inner port is open (port {port}): whoever reaches it runs code here.",
                hint="Install the Ray that constraints.txt names.",
            )


def _listeners() -> list[tuple[str, int]]:
    import psutil

    found = psutil.Process().net_connections("tcp")
    return [(c.laddr.ip, c.laddr.port) for c in found if c.status == psutil.CONN_LISTEN]


def _leave() -> None:
    """End a replica whose engine died: it would answer 503 at once, and so be given every request. Asks that it holds
    get a moment to be told; then others are asked."""
    logs.line("engine", state="dead", pid=os.getpid())
    threading.Timer(0.5, os._exit, (1,)).start()


class EngineReplica:
    """A `Host` in a process of its own."""

    async def __init__(self, settings: dict[str, Any]):  # type: ignore[misc]
        from bioseq.bundles.registry import Registry
        from serving.engine.catalogue import Catalogue
        from serving.engine.host import Host
        from serving.telemetry.metrics import EngineMetrics

        shut_inner_port()
        self.settings = Settings.from_dict(settings)
        logs.to_file(self.settings.log_file)
        self.metrics = EngineMetrics()
        registry = Registry(self.settings.registry)
        catalogue = Catalogue(registry, self.settings.model)
        self.host = Host(self.settings, catalogue, observer=self.metrics, on_death=_leave)
        await self.host.start()
        self._task = asyncio.create_task(self._beat())

    async def answer(self, ask: Any) -> Any:
        return await self.host.answer(ask)

    async def status(self) -> dict[str, Any]:
        self.host.engine.check()
        return self.host.status()

    async def check_health(self) -> None:
        """Raises when the engine's thread is dead or hangs, its device failed, or Serve's inner port is open; Serve then
        replaces this replica."""
        check_inner_port()
        await self.host.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        engine = self.host.engine
        return {"queued_tokens": float(engine.status()["queued_tokens"]), "busy": engine.busy_since()}

    async def _beat(self) -> None:
        """Follow the registry, so that a new default is loaded before it is asked for; report metrics."""
        from serving.cluster.board import open_board

        board = await asyncio.to_thread(open_board)
        process = f"engine-{serve.get_replica_context().replica_id.unique_id}"
        while True:
            await asyncio.sleep(self.settings.poll_s)
            try:
                if await asyncio.to_thread(self.host.catalogue.refresh):
                    await self.host.warm()
                text = self.metrics.text(self.host.engine.status()["queued_tokens"])
                await board.push.remote(process, text)
            except Exception as error:
                logs.trouble("engine beat", error)

    async def __del__(self) -> None:
        self._task.cancel()
        self.host.engine.stop()


class SearchReplica:
    """`Searches` in a process of its own, without a GPU."""

    async def __init__(self, settings: dict[str, Any]):  # type: ignore[misc]
        from serving.engine.searches import Searches

        shut_inner_port()
        plain = Settings.from_dict(settings)
        logs.to_file(plain.log_file)
        self.settings, self.searches = plain, Searches(plain)
        self.searches.engine.start()
        # It may have to build the index: requests for a reference set wait for it as long as for a full queue.
        self._task = asyncio.create_task(self.searches.warm())

    async def find(self, ask: Any) -> Any:
        if ask.reference is not None:
            try:
                await asyncio.wait_for(asyncio.shield(self._task), self.settings.max_queue_s)
            except TimeoutError:
                return self.searches.preparing()
        return await self.searches.find(ask)

    async def status(self) -> dict[str, Any]:
        return await self.searches.status()

    async def check_health(self) -> None:
        check_inner_port()
        self.searches.engine.check()

    async def __del__(self) -> None:
        self._task.cancel()
        self.searches.engine.stop()


class Ingress:
    """FastAPI in front of the engines."""

    def __init__(self, settings: dict[str, Any], engines: Any, searches: Any):
        shut_inner_port()
        pace.in_replica()
        self.settings = Settings.from_dict({**settings, "behind_serve": True})
        self.engines, self.searches = engines, searches

    async def check_health(self) -> None:
        check_inner_port()

    def _link(self, handle: Any, limit: int) -> Any:
        from serving.engine.link import HandleLink

        s = self.settings
        return HandleLink(handle, recovery_s=s.recovery_s, patience_s=s.max_queue_s, limit=limit)

    def __serve_build_asgi_app__(self) -> Any:
        from bioseq.bundles.registry import Registry
        from serving.cluster.board import RemoteBoard, open_board
        from serving.database.base import Database
        from serving.engine.catalogue import Catalogue
        from serving.http.app import create_app
        from serving.http.service import Service

        logs.to_file(self.settings.log_file)
        catalogue = Catalogue(Registry(self.settings.registry), self.settings.model)
        catalogue.refresh()
        process = f"ingress-{serve.get_replica_context().replica_id.unique_id}"
        board = RemoteBoard(open_board(), process)
        service = Service(
            self.settings,
            self._link(self.engines, self.settings.max_queued_tokens),
            self._link(self.searches, self.settings.max_queued_residues),
            catalogue,
            Database(self.settings.database),
            board,
        )
        app = create_app(service)
        self._task = asyncio.get_running_loop().create_task(_report(app, board))
        return pace.paced(app)


async def _report(app: Any, board: Any) -> None:
    """Tell the board how things stand, and hear whether the service is stopping."""
    while True:
        await asyncio.sleep(0.5)
        try:
            app.draining = await board.actor.push.remote(board.process, app.metrics.text(), app.in_flight)
        except Exception as error:
            logs.trouble("ingress report", error)


_FULL = 0.8  # of an engine's time: busier ones call for another


def by_tokens(context: Any, target: float = 32_768.0) -> tuple[int, dict[str, Any]]:
    """Autoscaling policy, on waiting plus running: so many replicas that what runs keeps each busy for 80 % of its time,
    and one more for every `target` tokens that wait. Serve averages the figures and delays the steps (its
    `look_back_period_s`, `upscale_delay_s` and `downscale_delay_s`)."""
    metrics = context.aggregated_metrics or {}
    waiting = sum(metrics.get("queued_tokens", {}).values()) / target
    running = sum(metrics.get("busy", {}).values()) / _FULL
    wanted = math.ceil(round(waiting + running, 6))
    if context.total_num_requests > 0:
        wanted = max(wanted, 1)
    low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(low, min(high, wanted)), {}


class TokensPolicy:
    """`by_tokens` with its target, as Serve makes policies from config files."""

    def __init__(self, target: float = 32_768.0):
        self.target = target

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        return by_tokens(context, self.target)


def build(args: dict[str, Any] | None = None) -> Any:
    """The Ray Serve application, for `serve.run` and for config files (`import_path:
    serving.cluster.deployment:build`, `args:` are `Settings`). Brings the database to its newest migration."""
    from serving.database.base import Database

    settings = Settings.from_dict(dict(args or {}))
    database = Database(settings.database)
    database.upgrade()
    database.dispose()
    plain = settings.to_dict()
    scale: dict[str, Any] = {"num_replicas": settings.engine_replicas}
    if settings.max_engine_replicas > settings.engine_replicas:
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=settings.min_engine_replicas,
                initial_replicas=settings.engine_replicas,
                max_replicas=max(settings.max_engine_replicas, settings.engine_replicas),
                policy=AutoscalingPolicy(
                    policy_function="serving.cluster.deployment:TokensPolicy",
                    policy_kwargs={"target": settings.target_queued_tokens},
                ),
            )
        }
    engine = serve.deployment(
        name="engine",
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": settings.engine_cpus, "num_gpus": settings.engine_gpus},
        **scale,
    )(EngineReplica)
    ingress = serve.deployment(
        name="api",
        num_replicas=settings.ingress_replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(Ingress))
    search = serve.deployment(
        name="homologs",
        num_replicas=settings.search_replicas,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_s,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": settings.search_cpus},
    )(SearchReplica)
    return ingress.bind(plain, engine.bind(plain), search.bind(plain))
