"""`AsyncClient` against the real routes of jobs and files, in one process."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from test_jobs_routes import begun

from bioseq.client import AsyncClient
from bioseq.errors import ServiceError, SpecError

pytestmark = pytest.mark.asyncio


async def test_a_job_from_its_upload_to_its_result(api, tmp_path):
    library = tmp_path / "my library.fasta"
    library.write_bytes(b">a\nMKTAYIAKQR\n" * 1000)
    async with (
        api() as http,
        AsyncClient("http://bioseq", transport=httpx.ASGITransport(http.app)) as remote,
    ):
        job = await remote.submit("screen", {"inputs": [str(library)], "heads": ["stability"]}, name="mine")
        assert [f["name"] for f in await remote.files()] == ["my_library.fasta"]
        assert [j["id"] for j in await remote.jobs(kind="screen")] == [job["id"]]
        with pytest.raises(ServiceError) as caught:
            await remote.result_files(job["id"])
        assert (caught.value.status, caught.value.code) == (409, "job.no_result")
        run = await begun(http, job["id"])
        folder, _ = http.noop.folders[run]
        log = asyncio.create_task(_list(remote.follow(job["id"])))
        folder.note("hello")
        (folder.output / "sub").mkdir(parents=True)
        (folder.output / "sub" / "part 1.csv").write_bytes(b"0123456789" * 1000)
        (folder.output / "empty.csv").write_bytes(b"")
        http.noop.finish(run)
        seen = await log
        assert {"event": "line", "line": "[job] hello"} in seen
        assert seen[-1] == {"event": "end", "state": "SUCCEEDED", "reason": None, "registered": None}
        assert (await remote.wait(job["id"]))["state"] == "SUCCEEDED"
        assert "hello" in await remote.logs(job["id"])
        out = tmp_path / "out"
        (out / "sub").mkdir(parents=True)
        files = {f["name"]: f["href"] for f in await remote.result_files(job["id"])}
        tag = (await http.get(files["sub/part 1.csv"])).headers["etag"]
        (out / "sub" / ".part 1.csv.part").write_bytes(b"ABCDE")  # a download that broke off there
        (out / "sub" / ".part 1.csv.etag").write_text(tag)
        await remote.result(job["id"], out)
        assert (out / "sub" / "part 1.csv").read_bytes() == b"ABCDE" + (b"0123456789" * 1000)[5:]
        assert (out / "empty.csv").read_bytes() == b"" and len(list(out.rglob("*.csv"))) == 2
        assert await remote.purge(job["id"]) is None
        with pytest.raises(ServiceError) as caught:
            await remote.job(job["id"])
        assert caught.value.status == 404
        with pytest.raises(SpecError, match="top"):
            await remote.submit("screen", {"inputs": [str(library)], "heads": ["stability"], "top": 0})
        other = await remote.submit("screen", {"inputs": [str(library)], "heads": ["stability"]})
        await remote.cancel(other["id"])
        assert (await remote.wait(other["id"], timeout=60, poll=0.1))["state"] == "CANCELLED"


async def _list(items):
    return [item async for item in items]
