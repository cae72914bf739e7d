"""Stores, schedulers and executors of tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))  # serving_helpers: tiny real bundles

import pytest
from jobs_helpers import NoOp, Rig

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
