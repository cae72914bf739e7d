"""Tables of jobs and files. Owners are key ids without a foreign key: the anonymous key has no row."""

from __future__ import annotations

import datetime

from sqlalchemy import BigInteger, Boolean, Index, Integer, String, Text
from sqlalchemy.orm import Mapped, mapped_column

from serving.database.base import Base, UtcTime

PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED = "PENDING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED"
STATES = (PENDING, RUNNING, SUCCEEDED, FAILED, CANCELLED)
ACTIVE = (PENDING, RUNNING)
ENDED = (SUCCEEDED, FAILED, CANCELLED)


class FileRow(Base):
    """An uploaded file; there is a row only once it is whole."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(16), index=True)
    name: Mapped[str] = mapped_column(String(200))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created: Mapped[datetime.datetime] = mapped_column(UtcTime)
    expires: Mapped[datetime.datetime] = mapped_column(UtcTime, index=True)


class JobRow(Base):
    """A job. `number` counts submissions, and orders them. `spec` is what was admitted: exact model names,
    files as `file:ID`. `attempt` is the fencing token; `failures` those attempts that were lost."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("jobs_idempotency", "owner", "idempotency_key", unique=True),
        Index("jobs_state", "state", "number"),
    )

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    id: Mapped[str] = mapped_column(String(32), unique=True)
    owner: Mapped[str] = mapped_column(String(16), index=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(200))
    spec: Mapped[str] = mapped_column(Text)
    files: Mapped[str] = mapped_column(Text)
    register: Mapped[str | None] = mapped_column(String(120))
    accept_weak: Mapped[bool] = mapped_column(Boolean)
    idempotency_key: Mapped[str | None] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    attempt: Mapped[int] = mapped_column(Integer)
    failures: Mapped[int] = mapped_column(Integer)
    cancel: Mapped[bool] = mapped_column(Boolean)
    created: Mapped[datetime.datetime] = mapped_column(UtcTime)
    started: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    ended: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    reason: Mapped[str | None] = mapped_column(Text)
    registered: Mapped[str | None] = mapped_column(String(200))


class NameRow(Base):
    """Whose a model's name is: of the key whose job was the first to ask for it, kept for ever once it registered.
    Names without a row belong to the operator."""

    __tablename__ = "names"

    name: Mapped[str] = mapped_column(String(120), primary_key=True)
    owner: Mapped[str] = mapped_column(String(16), index=True)
    since: Mapped[datetime.datetime] = mapped_column(UtcTime)
    registered: Mapped[bool] = mapped_column(Boolean)


class CampaignRow(Base):
    """A campaign, whose folder holds everything else."""

    __tablename__ = "campaigns"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    owner: Mapped[str] = mapped_column(String(16), index=True)
    name: Mapped[str] = mapped_column(String(200))
    created: Mapped[datetime.datetime] = mapped_column(UtcTime)


class LeaseRow(Base):
    """Who may act as `name`. `token` grows with every holder: a write under an old one is refused."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    token: Mapped[int] = mapped_column(BigInteger)
    expires: Mapped[datetime.datetime] = mapped_column(UtcTime)
