"""Stores, schedulers and executors of tests."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))  # serving_helpers: tiny real bundles

import httpx
import pytest
from jobs_helpers import NoOp, Rig

from bioseq.bundles.registry import Registry
from serving.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "database": f"sqlite:///{tmp_path / 'service.sqlite'}",
            "home": str(tmp_path / "home"),
            "data": str(tmp_path / "data"),
            "registry": str(tmp_path / "registry"),
            "threads": 1,
            "poll_s": 0.1,
            "homologs": "none",
            "jobs_poll_s": 0.05,
            "log_file": str(tmp_path / "access.jsonl"),
        }
        return Settings.from_dict(given | changes)

    return make


@pytest.fixture
def rig(settings: Callable[..., Settings]) -> Callable[..., Rig]:
    """A database, a no-op executor and a scheduler over them."""

    def make(executor: NoOp | None = None, **changes: Any) -> Rig:
        return Rig(settings(**changes), executor or NoOp())

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundles: a tiny real backbone, and a head on it."""
    from serving_helpers import make_backbone, make_head

    from bioseq.bundles.bundle import open_bundle

    folder = tmp_path_factory.mktemp("bundles")
    base = make_backbone(folder / "tiny")
    return {"tiny": base, "stability": make_head(folder / "stability", open_bundle(base), "stability")}


@pytest.fixture
def registry(tmp_path: Path, tiny: dict[str, Path]) -> Registry:
    (tmp_path / "none").mkdir()
    made = Registry(tmp_path / "registry", shipped=tmp_path / "none")
    for folder in tiny.values():
        made.register(folder)
    made.alias("default", "tiny@1")
    return made


@pytest.fixture
def api(
    settings: Callable[..., Settings], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """`async with api() as http:` the service in this process, with a no-op executor: `http.noop`,
    `http.store`."""

    @contextlib.asynccontextmanager
    async def start(executor: Any = None, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        from serving.http.app import in_process
        from serving.jobs import loop

        noop = executor or NoOp()
        monkeypatch.setattr(loop, "make_executor", lambda: noop)
        async with in_process(settings(**changes), registry=registry) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://bioseq", timeout=120) as http:
                http.noop, http.app, http.store = noop, app, app.service.extras["jobs"]  # type: ignore[attr-defined]
                yield http

    return start
