"""Campaigns through the service: a round by a job that is killed, results, the report; owners; what is refused."""

from __future__ import annotations

import asyncio
import csv
import io
import os
import signal
from pathlib import Path

import httpx
import pytest
from test_jobs_security import bearer, keys, put  # noqa: F401
from test_jobs_whole import the_driver, until

from bioseq.campaigns.campaign import Campaign
from bioseq.client import AsyncClient
from bioseq.errors import InputError, ServiceError, SpecError
from serving.jobs.executors import ProcessExecutor
from training.campaigns.propose import propose

pytestmark = pytest.mark.asyncio
WILD = "MKTAYIAKQRQISFVKSHFSRQ"
SMALL = {"wild_type": WILD, "objectives": ["activity"], "sites": [4, 7], "batch": 12, "controls": 2}


def measured(plate: str) -> list[dict[str, str]]:
    rows = list(csv.DictReader(io.StringIO(plate)))
    return [r | {"activity": str(sum(map(ord, r["variant"])) % 17)} for r in rows]


def table(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(
        ["variant,well,activity", *(f"{r['variant']},{r['well']},{r['activity']}" for r in rows)]
    ).encode()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.long
async def test_a_killed_propose_leaves_a_campaign_that_goes_on(api, settings, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.jobs.scheduler.LOST_S", 0.2)
    executor = ProcessExecutor()
    async with (
        api(executor) as http,
        AsyncClient("http://bioseq", transport=httpx.ASGITransport(http.app)) as remote,
    ):
        made = await remote.create_campaign(
            WILD, ["activity"], sites=[4, 7], batch=12, controls=2, name="mine"
        )
        assert (made["rounds"], made["space"], made["settings"]["batch"]) == (0, 399, 12)
        campaign = Campaign(Path(settings().data) / "campaigns" / made["id"])
        scan = (await http.post("/v1/scan", json={"sequence": WILD, "homologs": "none"})).json()
        at = scan["letters"].index("C")
        assert campaign.prior[3, 1] == pytest.approx(
            scan["scores"][3][at], abs=1e-3
        )  # C is second of LETTERS
        job = await remote.submit("propose", {"campaign": made["id"]})
        os.kill((await the_driver(executor)).pid, signal.SIGKILL)
        ended = await until(http, job["id"], "SUCCEEDED")
        assert ended["attempt"] == 2 and ended["registered"] is None
        assert (await remote.campaign(made["id"]))["wells"]["proposed"] == 12
        plate = await remote.plate(made["id"], 1)
        [saved] = [p for p in await remote.result(job["id"], tmp_path / "out") if p.name == "plate.csv"]
        assert saved.read_text() == plate
        (tmp_path / "r.csv").write_bytes(table(measured(plate)))
        counts = await remote.ingest(made["id"], tmp_path / "r.csv")
        assert counts == {"measured": 12, "failed": 0, "unproposed": 0}
        again = await remote.submit("propose", {"campaign": made["id"]})
        await until(http, again["id"], "SUCCEEDED")
        assert await remote.mark(made["id"], "ordered") == 12
        status = await remote.campaign(made["id"])
        assert status["rounds"] == 2 and status["best"]["activity:max"]["value"] <= 16
        page = await remote.campaign_report(made["id"], tmp_path / "report.html")
        assert "data:image/png;base64," in page.read_text()
        assert [c["name"] for c in await remote.campaigns()] == ["mine"]


async def test_a_campaign_belongs_to_its_key(api, keys):  # noqa: F811
    alice, mallory = bearer(keys["alice"]), bearer(keys["mallory"])
    async with api() as http:
        made = await http.post("/v1/campaigns", json=SMALL, headers=alice)
        assert made.status_code == 201, made.text
        own = made.json()["id"]
        assert made.headers["location"] == f"/v1/campaigns/{own}"
        text = {"content": b"variant,activity\nA4C,1\n", "headers": mallory | {"content-type": "text/csv"}}
        for method, path, more in (
            ("GET", "", {}), ("GET", "/report", {}), ("GET", "/plates/1", {}), ("GET", "/ledger", {}), ("DELETE", "", {}),
            ("POST", "/ingest", text), ("POST", "/mark", {"json": {"event": "ordered"}}),
        ):  # fmt: skip
            for asked in (own, "f" * 24):
                answer = await http.request(
                    method, f"/v1/campaigns/{asked}{path}", **{"headers": mallory} | more
                )
                assert (answer.status_code, answer.json()["code"]) == (404, "campaign.not_found"), path
        sent = {"kind": "propose", "spec": {"campaign": own}}
        assert (await http.post("/v1/jobs", json=sent, headers=mallory)).status_code == 404
        assert (await http.get("/v1/campaigns", headers=mallory)).json()["data"] == []
        assert (await http.get("/v1/campaigns", headers=bearer(keys["reader"]))).status_code == 403
        assert (await http.get(f"/v1/campaigns/{own}", headers=bearer(keys["boss"]))).status_code == 200
        file = await put(http, keys["alice"], "list.csv", b"variant\nA4C\n")
        stolen = SMALL | {"sites": [], "candidates": f"file:{file}"}
        assert (await http.post("/v1/campaigns", json=stolen, headers=mallory)).status_code == 404
        job = (await http.post("/v1/jobs", json=sent, headers=alice)).json()["id"]
        busy = await http.delete(f"/v1/campaigns/{own}", headers=alice)
        assert (busy.status_code, busy.json()["code"]) == (409, "campaign.busy")
        await http.delete(f"/v1/jobs/{job}", headers=alice)
        await asyncio.sleep(0)
        while (await http.get(f"/v1/jobs/{job}", headers=alice)).json()["state"] != "CANCELLED":
            await asyncio.sleep(0.05)
        assert (await http.delete(f"/v1/campaigns/{own}", headers=alice)).status_code == 204
        assert (await http.get(f"/v1/campaigns/{own}", headers=alice)).status_code == 404


async def test_what_is_refused_changes_nothing(api, settings, tmp_path):
    async with (
        api(max_campaigns_per_key=2) as http,
        AsyncClient("http://bioseq", transport=httpx.ASGITransport(http.app)) as remote,
    ):
        (tmp_path / "c.csv").write_text("variant\nA4C\nA7D:A4C\n")
        made = await remote.create_campaign(WILD, ["activity"], candidates=tmp_path / "c.csv", model="none")
        folder = Path(settings().data) / "campaigns" / made["id"]
        before = everything(folder)
        results = tmp_path / "r.csv"
        for text, where in (
            ("variant,activity\nA4C,high\n", "line 2, column 'activity'"),
            ("variant,activity\nA4C,1\nK4C,2\n", "line 3, column 'variant'"),
            ("variant,activity\nA4C,1\nA4D,1\n", "line 3, column 'variant'"),
            ("variant,other\nA4C,1\n", "line 1"),
        ):
            results.write_text(text)
            with pytest.raises(InputError, match=where) as caught:
                await remote.ingest(made["id"], results)
            assert str(tmp_path) not in str(caught.value)
        (tmp_path / "c.csv").write_text("variant\nA4C\nK4C\n")
        with pytest.raises(InputError, match="candidates: line 3, column 'variant'"):
            await remote.create_campaign(WILD, ["activity"], candidates=tmp_path / "c.csv", model="none")
        for fields, field in (
            ({}, "candidates"), ({"sites": [4], "batch": 97}, "batch"), ({"sites": [4], "objectives": ["a:most"]}, "objective"),
        ):  # fmt: skip
            wanted = {"objectives": ["activity"]} | fields
            with pytest.raises(SpecError, match=field):
                await remote.create_campaign(WILD, **wanted)
        with Campaign(folder).locked():
            with pytest.raises(ServiceError) as busy:
                await remote.mark(made["id"], "ordered")
            assert (busy.value.status, busy.value.code) == (409, "campaign.busy")
            assert str(folder) not in str(busy.value)
        with pytest.raises(ServiceError, match="no such round"):
            await remote.plate(made["id"], 1)
        assert (await http.post(f"/v1/campaigns/{made['id']}/ingest", json={})).status_code == 400
        for spec in ({"campaign": "/etc"}, {"campaign": made["id"], "after": 3}):
            with pytest.raises((SpecError, ServiceError)):
                await remote.submit("propose", spec)
        assert {k: v for k, v in everything(folder).items() if k != ".lock"} == before
        assert len(list(folder.parent.iterdir())) == 1
        propose(Campaign(folder))
        results.write_bytes(table(measured(await remote.plate(made["id"], 1))))
        assert (await remote.ingest(made["id"], results))["failed"] == 0
        assert (await remote.campaign(made["id"]))["wells"]["measured"] == 6  # two variants, four controls
        await remote.create_campaign(WILD, ["activity"], sites=[4], batch=6)
        with pytest.raises(ServiceError) as full:
            await remote.create_campaign(WILD, ["activity"], sites=[4], batch=6)
        assert full.value.code == "quota.campaigns"
