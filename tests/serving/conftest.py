"""The whole service in this process, around a tiny real backbone in a registry of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import pytest
from serving_helpers import TASKS, make_backbone, make_head

from bioseq.bundles.bundle import open_bundle
from bioseq.bundles.registry import Registry
from serving.settings import Settings


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name to folder: the backbone `tiny`, and a head for every task."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"tiny": make_backbone(folder / "tiny")}
    base = open_bundle(made["tiny"])
    return made | {name: make_head(folder / name, base, name) for name in TASKS}


@pytest.fixture
def registry(tmp_path: Path, bundles: dict[str, Path]) -> Registry:
    empty = tmp_path / "nothing-shipped"
    empty.mkdir()
    made = Registry(tmp_path / "registry", shipped=empty)
    for folder in bundles.values():
        made.register(folder)
    made.alias("default", "tiny@1")
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "database": f"sqlite:///{tmp_path / 'service.sqlite'}",
            "home": str(tmp_path / "home"),
            "threads": 1,
            "poll_s": 0.1,
            "homologs": "none",
            "log_file": str(tmp_path / "access.jsonl"),
        }
        return Settings.from_dict(given | changes)

    return make


@pytest.fixture
def serve(registry: Registry, settings: Callable[..., Settings]) -> Callable[..., Any]:
    """`async with serve(max_items=3) as http:` an httpx client; `http.app` is the application."""

    @contextlib.asynccontextmanager
    async def start(*, load: Any = None, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        from serving.http.app import in_process

        async with in_process(settings(**changes), registry=registry, load=load) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://bioseq", timeout=120) as http:
                http.app = app  # type: ignore[attr-defined]
                yield http

    return start


class Live:
    """The service behind a real socket: uvicorn in a thread."""

    def __init__(self, settings: Settings, registry: Registry, load: Any = None):
        self.app: Any = None
        self.url = ""
        self._settings, self._registry, self._load = settings, registry, load
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        import uvicorn

        from serving.http.app import in_process

        async with in_process(self._settings, registry=self._registry, load=self._load) as self.app:
            config = uvicorn.Config(self.app, port=0, log_level="error", lifespan="off")
            self.server = uvicorn.Server(config)
            task = asyncio.create_task(self.server.serve())
            while not self.server.started:
                await asyncio.sleep(0.01)
            port = self.server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._ready.set()
            await task

    def __enter__(self) -> Live:
        self._thread.start()
        assert self._ready.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(60)


@pytest.fixture
def live(registry: Registry, settings: Callable[..., Settings]) -> Callable[..., Live]:
    """`with live(max_items=3) as service:` at `service.url`."""
    return lambda load=None, **changes: Live(settings(**changes), registry, load)
