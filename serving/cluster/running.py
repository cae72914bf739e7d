"""`bioseq serve`: from a command to an answering service, and back to nothing."""

from __future__ import annotations

import contextlib
import functools
import http.client
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bioseq.errors import ResourceError, ServiceError
from serving.cluster.lone_ray import settle
from serving.cluster.pace import IN_PROXY
from serving.cluster.terminal import loggers_too, ray_told_to
from serving.settings import Settings

# Serve runs user code in a second event loop by default; with one loop a request makes fewer hops.
_FASTER = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
}

_PACED = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": IN_PROXY
}  # Serve's proxies ask it what to run as they start
_END_S = 30.0  # for Ray's own ending; what has not ended by then is killed


def token_file(home: str) -> Path:
    """A Ray auth token of 256 bits that only this user can read; made once."""
    path = Path(home) / "ray_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as out:
            out.write(secrets.token_hex(32))
    if path.stat().st_mode & 0o077:
        os.chmod(path, 0o600)
    return path


def secure_ray(home: str) -> None:
    """Token auth for the Ray cluster that this process is about to start, unless the environment says how.
    Before `import ray`."""
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
    if os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(
        os.environ
    ):
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file(home))


def check_keys(settings: Settings) -> None:
    """Raises `ServiceError` off loopback without keys, `ResourceError` for a database that cannot be used."""
    from serving.database.base import Database
    from serving.database.keys import Keys

    database = Database(settings.database)
    database.upgrade()
    keys = Keys(database).any()
    database.dispose()
    if not settings.on_loopback and not settings.insecure and not keys:
        raise ServiceError(
            f"{settings.host} can be reached from outside and no API key exists.",
            code="serve.insecure",
            hint="Make one: bioseq keys create NAME. Or serve on 127.0.0.1, or say --insecure.",
        )


def check_port(settings: Settings) -> None:
    """Raises `ResourceError` if the port cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ResourceError(
                f"cannot listen on {settings.host}:{settings.port}: {error.strerror}.",
                hint="Choose another --port.",
            ) from error


def check_model(settings: Settings) -> str:
    """The exact name of the backbone to serve. Raises `NotFoundError`, `BundleError`."""
    from bioseq.bundles.registry import Registry
    from serving.engine.catalogue import Catalogue

    catalogue = Catalogue(Registry(settings.registry), settings.model)
    catalogue.refresh()
    model = catalogue.backbone()
    catalogue.manifest(model)
    return model.exact


@contextlib.contextmanager
def _own_agent_port() -> Iterator[None]:
    """Ray's agent, which starts jobs, has the fixed port 52365: beside another Ray on this machine it has none, and
    every job is refused. `ray.init` knows no option for it; 0 lets the kernel choose."""
    from ray._private import parameter as room

    parameter: Any = room
    plain = parameter.RayParams
    parameter.RayParams = functools.partial(plain, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        parameter.RayParams = plain


def _ray_lives() -> bool:
    """Whether the Ray that this process started still runs, both its halves: a signal to the whole process group, which
    is what systemd sends, ends them with us, and a raylet that outlives its GCS waits for it for minutes."""
    import psutil

    alive = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if child.status() != psutil.STATUS_ZOMBIE:
                alive.add(child.name())
    return all(any(name.startswith(part) for name in alive) for part in ("raylet", "gcs_server"))


class _Watchdog:
    """Ends this process, with all that it started, if after `start` the Ray that it owns dies (calls would wait for it in
    vain) or has not ended in `seconds`. Of its own thread, as the main one may be inside such a call."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.error: BaseException | None = None
        self.ending, self.done = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()

    def start(self) -> None:
        """Once stopping has begun. Again: nothing."""
        if self._thread.ident is None:
            self._thread.start()

    def _watch(self) -> None:
        import psutil

        until = time.monotonic() + self.seconds
        while not self.done.wait(0.2):
            if time.monotonic() <= until and (self.ending.is_set() or _ray_lives()):
                continue
            said = self.error or "Ray does not answer any more; ending without it"
            print(f"bioseq serve: {said}", file=sys.stderr, flush=True)
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            os._exit(1 if self.error else 0)


@contextlib.contextmanager
def ray_session(settings: Settings, address: str | None, num_cpus: int | None) -> Iterator[Any]:
    """Ray, started here and ended here, or joined at `address` and left as it was."""
    for name, value in {**_FASTER, **_QUIET, **_PACED}.items():
        os.environ.setdefault(name, value)
    settle(address)
    if address is None:
        secure_ray(settings.home)
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "namespace": "bioseq"}
    try:
        if address is None:
            # Logical CPUs: fractions are shared out, and jobs must find room beside a busy engine.
            with _own_agent_port():
                ray.init(
                    address="local",
                    num_cpus=num_cpus or max(4, os.cpu_count() or 1),
                    include_dashboard=True,
                    dashboard_host="127.0.0.1",
                    **quiet,
                )
        else:
            ray.init(address=address, **quiet)
    except Exception as error:
        said = next((row.strip() for row in str(error).splitlines() if row.strip()), type(error).__name__)
        where = "here" if address is None else f"at {address}"
        raise ResourceError(
            f"Ray could not be started or reached {where}: {said[:300]}",
            hint="Look for free memory, disk space under $RAY_TMPDIR, and for a cluster its address and token.",
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def start_serve(**options: Any) -> None:
    """Ray Serve, started or joined. On a busy machine a proxy may miss its first health check: Serve kills it, starts
    it again, and fails the call that waited. Raises `ResourceError` if none comes up."""
    from ray import serve
    from ray.exceptions import RayActorError

    for _ in range(3):
        try:
            serve.start(**options)
            return
        except (RayActorError, TimeoutError):
            time.sleep(1)
    raise ResourceError(
        "Ray Serve could not start its HTTP proxies.", hint="The machine may be too busy, or short of memory."
    )


def wait_ready(settings: Settings, stop: threading.Event, *, seconds: float = 120.0) -> None:
    """Until the port answers that the service is ready, so that "ready" is true. Raises `ResourceError`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    until = time.monotonic() + seconds
    while not stop.is_set():
        connection = http.client.HTTPConnection(host, settings.port, timeout=10)
        try:
            connection.request("GET", "/health/ready")
            if connection.getresponse().status == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        if time.monotonic() > until:
            raise ResourceError(
                f"the service did not answer at {host}:{settings.port} within {seconds:.0f} s.",
                hint="The machine may be too busy, or short of memory.",
            )
        stop.wait(0.2)


def drain(ray: Any, seconds: float) -> None:
    """Turn new requests away and wait for those in flight."""
    from serving.cluster.board import open_board

    try:
        board = open_board()
        ray.get(board.drain.remote(True), timeout=5)
        time.sleep(1.2)  # every ingress has heard by now
        until = time.monotonic() + seconds
        while waiting := ray.get(board.in_flight.remote(3.0), timeout=5)[0]:
            if time.monotonic() >= until:
                break
            time.sleep(0.2)
        else:
            return
        print(
            f"bioseq serve: {waiting} requests were not done in {seconds:.0f} s and are cut off",
            file=sys.stderr,
        )
    except Exception as error:
        print(f"bioseq serve: stopping without waiting ({type(error).__name__})", file=sys.stderr)


def run(
    settings: Settings,
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or `stop`; then drain and leave nothing behind. Returns the exit code."""
    began = time.monotonic()
    exact = check_model(settings)
    check_keys(settings)
    if address is None:
        check_port(settings)
    stop = stop or threading.Event()
    # The settings carry it. Ray's workers inherit this environment, those of jobs among them, which need no database.
    os.environ.pop("BIOSEQ_DATABASE", None)
    with (
        _Watchdog(settings.drain_s + _END_S) as watchdog,
        ray_told_to(Path(settings.home) / "logs" / "ray.log"),
        ray_session(settings, address, num_cpus) as ray,
    ):
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig

        from serving.cluster.board import open_board
        from serving.cluster.deployment import APP, build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        loggers_too()

        def begin_to_stop(*_: Any) -> None:
            stop.set()
            if address is None:  # a Ray that we joined is not ours to judge
                watchdog.start()

        before = {s: signal.signal(s, begin_to_stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            start_serve(
                http_options=HTTPOptions(host=settings.host, port=settings.port, keep_alive_timeout_s=75),
                logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
            )
            board = open_board()
            ray.get(board.drain.remote(False))
            serve.run(build(settings.to_dict()), name=APP, route_prefix="/", blocking=False)
            host = f"[{settings.host}]" if ":" in settings.host else settings.host
            if address is None:
                wait_ready(settings, stop)
            print(
                f"bioseq serve: {exact} at http://{host}:{settings.port} "
                f"(ready in {time.monotonic() - began:.1f} s; docs at /docs; Ctrl-C stops)",
                file=sys.stderr,
                flush=True,
            )
            while not stop.wait(0.5):
                pass
            print("bioseq serve: stopping", file=sys.stderr, flush=True)
            begin_to_stop()
            drain(ray, settings.drain_s)
        finally:
            watchdog.error = sys.exc_info()[1]
            begin_to_stop()
            if address is None:
                serve.shutdown()
            else:
                serve.delete(APP)
            with contextlib.suppress(Exception):
                ray.kill(open_board())
            watchdog.ending.set()
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0
