"""Campaigns of the service: a folder each in DATA/campaigns/ID, owned by a key."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import func, select

from bioseq.campaigns.campaign import Campaign
from serving.database.base import Database, now
from serving.jobs.tables import ACTIVE, CampaignRow, JobRow
from serving.problems import Problem

Rows = list[CampaignRow]  # the method `CampaignStore.list` hides the type's name inside the class


def folder_of(data: str | Path, campaign_id: str) -> Path:
    return Path(data) / "campaigns" / campaign_id


class CampaignStore:
    """All methods block on the database or the disk."""

    def __init__(self, database: Database, data: str | Path):
        self.database, self.data = database, Path(data)

    def create(
        self, owner: str, name: str, make: Callable[[Path], Campaign], *, limit: int
    ) -> tuple[CampaignRow, Campaign]:
        """Enter what `make` makes in the folder that it is given; nothing is left of one that fails. Raises `Problem` 429
        over `limit` campaigns of the owner, and what `make` raises."""
        with self.database.session() as session:
            count = session.scalar(
                select(func.count()).select_from(CampaignRow).where(CampaignRow.owner == owner)
            )
        if (count or 0) >= limit:
            raise Problem(
                429, "quota.campaigns", f"this key has {count} campaigns; the limit is {limit}. Delete some.",
                limit=limit, given=count, retry_after=30,
            )  # fmt: skip
        row = CampaignRow(id=secrets.token_hex(12), owner=owner, name=name, created=now())
        campaign = make(folder_of(self.data, row.id))
        try:
            with self.database.session() as session:
                session.add(row)
                session.flush()
        except BaseException:
            shutil.rmtree(campaign.folder, ignore_errors=True)
            raise
        return row, campaign

    def get(self, campaign_id: str, owner: str | None) -> CampaignRow:
        """Raises `Problem` 404, also for another owner's campaign."""
        with self.database.session() as session:
            row = session.get(CampaignRow, campaign_id)
        if row is None or (owner is not None and row.owner != owner):
            raise Problem(404, "campaign.not_found", "there is no such campaign.")
        return row

    def open(self, row: CampaignRow) -> Campaign:
        return Campaign(folder_of(self.data, row.id))

    def list(self, owner: str) -> Rows:
        """Newest first."""
        with self.database.session() as session:
            query = select(CampaignRow).where(CampaignRow.owner == owner)
            return list(session.scalars(query.order_by(CampaignRow.created.desc())))

    def delete(self, row: CampaignRow) -> None:
        """Raises `Problem` 409 while a pending or running job proposes for it."""
        with self.database.session() as session:
            jobs = select(JobRow).where(JobRow.kind == "propose", JobRow.state.in_(ACTIVE))
            for job in session.scalars(jobs):
                if json.loads(job.spec)["campaign"] == row.id:
                    raise Problem(
                        409, "campaign.busy", f"job {job.id} proposes for it. Cancel it first.", job=job.id
                    )
            known = session.get(CampaignRow, row.id)
            if known is not None:
                session.delete(known)
        shutil.rmtree(folder_of(self.data, row.id), ignore_errors=True)
