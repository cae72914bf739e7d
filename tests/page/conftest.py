"""The real service on loopback, and a headless Chromium that may load nothing else."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent / "serving"))  # serving_helpers: tiny real bundles
sys.path.insert(0, str(Path(__file__).parent.parent / "jobs"))  # live_service

import pytest
from page_helpers import Site, Tab

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A tiny backbone with a head of every task."""
    from serving_helpers import TASKS, make_backbone, make_head

    from bioseq.bundles.bundle import open_bundle
    from bioseq.bundles.registry import Registry

    folder = tmp_path_factory.mktemp("site")
    (folder / "none").mkdir()
    registry = Registry(folder / "registry", shipped=folder / "none")
    registry.register(make_backbone(folder / "tiny"))
    registry.alias("default", "tiny@1")
    base = open_bundle(folder / "tiny")
    for name in TASKS:
        registry.register(make_head(folder / name, base, name))
    with Site(folder, registry) as made:
        yield made


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium here. Install it: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any, site: Site) -> Iterator[Tab]:
    made = Tab(chromium, site.url)
    yield made
    made.context.close()
    assert not made.troubles, "\n".join(made.troubles)
