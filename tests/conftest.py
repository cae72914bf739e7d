"""Shared by all rooms: small torch, no network, a private registry home."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of small real files."""
    return DATA


@pytest.fixture(autouse=True)
def _private_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the user's own registry or cache."""
    home = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("BIOSEQ_HOME", str(home / "bioseq-home"))
    monkeypatch.setenv("BIOSEQ_CACHE", str(home / "bioseq-cache"))
