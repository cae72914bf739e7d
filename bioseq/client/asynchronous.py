"""The client for asyncio: `async with AsyncClient(url) as remote: await remote.embed(seqs)`."""

from __future__ import annotations

from bioseq.client import calls
from bioseq.client import campaigns as campaign_calls
from bioseq.client import jobs as job_calls
from bioseq.client import keys as key_calls
from bioseq.client.drivers import Awaiting
from bioseq.client.exchange import Connection


class AsyncClient(Connection):
    """`Client` for asyncio: the same methods, to be awaited; `follow` is an asynchronous iterator."""

    _driver = Awaiting
    limits = calls.limits
    models = calls.models
    estimate = calls.estimate
    embed = calls.embed
    logits = calls.logits
    predict = calls.predict
    score = calls.score
    scan = calls.scan
    search = calls.search
    stores = calls.stores
    homologs = calls.homologs
    keys = key_calls.keys
    create_key = key_calls.create_key
    revoke_key = key_calls.revoke_key
    upload = job_calls.upload
    files = job_calls.files
    delete_file = job_calls.delete_file
    submit = job_calls.submit
    jobs = job_calls.jobs
    job = job_calls.job
    cancel = job_calls.cancel
    purge = job_calls.purge
    logs = job_calls.logs
    follow = job_calls.follow
    wait = job_calls.wait
    result_files = job_calls.result_files
    result = job_calls.result
    create_campaign = campaign_calls.create_campaign
    campaigns = campaign_calls.campaigns
    campaign = campaign_calls.campaign
    delete_campaign = campaign_calls.delete_campaign
    ingest = campaign_calls.ingest
    mark = campaign_calls.mark
    plate = campaign_calls.plate
    campaign_ledger = campaign_calls.campaign_ledger
    campaign_report = campaign_calls.campaign_report

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self.driver.close_all()
