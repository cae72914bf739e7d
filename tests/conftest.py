"""Shared by all rooms: small torch, no network, a private registry home."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write a dated result file of this run")


class Record:
    """What each test took and printed, for benchmarks/results: the long tests' results are kept."""

    def __init__(self) -> None:
        self.tests: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 1)}
            printed = [
                line for line in report.capstdout.splitlines() if line.strip() and "(raylet)" not in line
            ]
            self.tests.append(row | ({"printed": printed} if printed and report.outcome == "passed" else {}))

    def pytest_sessionfinish(self) -> None:
        sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
        from _common import host, versions, write_result

        if self.tests:
            found = {"tests": self.tests, "host": host(), "versions": versions()}
            print(f"\n{write_result('test-long', found).relative_to(Path(__file__).parent.parent)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record"):
        config.pluginmanager.register(Record())
