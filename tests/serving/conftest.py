"""A tiny real backbone in a registry of its own, and the whole service in this process around it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import httpx
import pytest
import torch

from bioseq.bundle import save_backbone
from bioseq.model.config import CONFIGS
from bioseq.model.encoder import PackedEncoder
from bioseq.registry import Registry
from serving.settings import Settings


def make_backbone(folder: Path, *, seed: int = 7, name: str = "tiny") -> Path:
    torch.manual_seed(seed)
    encoder = PackedEncoder(CONFIGS["tiny"])
    encoder.init_weights(torch.Generator().manual_seed(seed))
    save_backbone(folder, encoder, name=name, card="# tiny\nRandom weights.", evidence={"none": True}, seed=seed)
    return folder


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_backbone(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def registry(tmp_path: Path, backbone: Path) -> Registry:
    empty = tmp_path / "nothing-shipped"
    empty.mkdir()
    made = Registry(tmp_path / "registry", shipped=empty)
    made.register(backbone)
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
            "log_file": str(tmp_path / "access.jsonl"),
        }
        return Settings.from_dict(given | changes)

    return make


@pytest.fixture
def serve(registry: Registry, settings: Callable[..., Settings]) -> Callable[..., Any]:
    """`async with serve(max_items=3) as http:` an httpx client; `http.app` is the outer layer."""

    @contextlib.asynccontextmanager
    async def start(*, load: Any = None, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
        from serving.app import in_process

        async with in_process(settings(**changes), registry=registry, load=load) as app:
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://bioseq", timeout=120) as http:
                http.app = app  # type: ignore[attr-defined]
                yield http

    return start


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)
