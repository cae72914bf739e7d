"""Real jobs on real data in one process, without Ray: a job's driver is killed, the service is stopped in
mid-job, and the head answers in the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.jobs.executors import ProcessExecutor

pytestmark = pytest.mark.asyncio
DATA = Path(__file__).parents[1] / "data"
BYTES = {"content-type": "application/octet-stream"}
GB1 = "MQYKLILNGKTLKGETTTEAVDAATAEKVFKQYANDNGVDGEWTYDDATKTFTVTE"
SMALL = {
    "models": ["linear"],
    "features": ["composition"],
    "bootstrap": 20,
    "threads": 1,
    "accept_weak": True,
}


async def state(http: Any, job: str) -> dict[str, Any]:
    return (await http.get(f"/v1/jobs/{job}")).json()


async def until(http: Any, job: str, *states: str, seconds: float = 240) -> dict[str, Any]:
    end = time.monotonic() + seconds
    while (found := await state(http, job))["state"] not in states:
        assert time.monotonic() < end, found
        assert found["state"] not in ("FAILED", "CANCELLED"), found["reason"]
        await asyncio.sleep(0.2)
    return found


def driver(executor: ProcessExecutor) -> psutil.Process | None:
    """The `python -m bioseq` process of a running job."""
    for process in executor._runs.values():
        if process.poll() is None:
            for child in psutil.Process(process.pid).children():
                if "bioseq" in " ".join(child.cmdline()):
                    return child
    return None


async def the_driver(executor: ProcessExecutor) -> psutil.Process:
    for _ in range(600):
        found = await asyncio.to_thread(driver, executor)
        if found is not None:
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("no driver")


async def test_a_killed_driver_and_a_stopped_service_lose_no_job(api, monkeypatch):
    monkeypatch.setattr("serving.jobs.scheduler.LOST_S", 0.2)
    first = ProcessExecutor()
    times: list[tuple[str, float]] = []
    clock = time.monotonic()

    def mark(what: str) -> None:
        nonlocal clock
        times.append((what, time.monotonic() - clock))
        clock = time.monotonic()

    async with api(first) as http:
        sent = await http.post(
            "/v1/files?name=gb1.csv", content=(DATA / "gb1_61.csv").read_bytes(), headers=BYTES
        )
        spec = {"labels": f"file:{sent.json()['id']}", "targets": ["target"], "register": "gb1", **SMALL}
        spec |= {"split": {"kind": "random"}}
        made = await http.post("/v1/jobs", json={"kind": "finetune", "spec": spec})
        assert made.status_code == 201, made.text
        job = made.json()["id"]
        mark("upload and submit")
        killed = await the_driver(first)
        os.kill(killed.pid, signal.SIGKILL)
        while (await state(http, job))["attempt"] < 2:
            await asyncio.sleep(0.1)
        mark("driver killed, resumed")
        await the_driver(first)
    # The service is gone, and the run with it.
    assert driver(first) is None
    mark("service stopped")
    second = ProcessExecutor()
    async with api(second) as http:
        ended = await until(http, job, "SUCCEEDED")
        mark("service started, job finished")
        assert ended["attempt"] == 3 and ended["registered"] == "gb1@1"
        log = (await http.get(f"/v1/jobs/{job}/logs")).text
        assert "was lost" in log and log.count("held-out rows") == 1
        answer = await http.post("/v1/predict", json={"sequences": [GB1], "heads": ["gb1"]})
        assert (
            answer.status_code == 200 and answer.json()["data"][0]["predictions"]["gb1"]["value"] is not None
        )
        mark("predict")
    print("\n" + "\n".join(f"{what:<32} {seconds:6.1f} s" for what, seconds in times))
