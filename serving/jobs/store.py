"""Jobs in the database: submitted and cancelled by routes, moved on by the scheduler under its lease."""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from serving.database.base import Database, now
from serving.jobs.lease import Lease
from serving.jobs.tables import ACTIVE, CANCELLED, ENDED, PENDING, RUNNING, FileRow, JobRow, NameRow
from serving.problems import Problem

Rows = list[JobRow]  # the method `JobStore.list` hides the type's name inside the class
Jobs = list["Started"]
Ids = list[str]
_SUBMIT_LOCK = 0x62696F6A  # PostgreSQL advisory lock: quotas are counted and used by one submission at a time


@dataclass(frozen=True)
class Admitted:
    """A checked submission. `spec` has exact model names and `file:ID` for files; see `admission`."""

    kind: str
    spec: dict[str, Any]
    files: tuple[str, ...] = ()
    name: str = ""
    register: str | None = None
    accept_weak: bool = False

    def digest(self) -> str:
        text = json.dumps([self.kind, self.spec, self.name, self.register, self.accept_weak], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Started:
    """What the scheduler has just moved to RUNNING, or found there."""

    id: str
    owner: str
    kind: str
    attempt: int
    failures: int
    cancel: bool
    spec: dict[str, Any] = field(repr=False)
    register: str | None = None
    accept_weak: bool = False


def _started(row: JobRow) -> Started:
    return Started(
        row.id, row.owner, row.kind, row.attempt, row.failures, row.cancel, json.loads(row.spec), row.register,
        row.accept_weak,
    )  # fmt: skip


class JobStore:
    """All methods block on the database."""

    def __init__(self, database: Database):
        self.database = database

    # ------------------------------------------------------------------------------------------------- routes

    def submit(
        self, owner: str, job: Admitted, *, max_active: int, idempotency_key: str | None = None
    ) -> tuple[JobRow, bool]:
        """The job, and whether it is new: the same key with the same content gives the first job again.

        Raises `Problem` 409 if the key was used for something else, 429 over `max_active` jobs, 404 if a file is
        gone.
        """
        digest = job.digest()
        with self.database.session() as session:
            if not self.database.is_sqlite:  # SQLite writes one transaction at a time anyway
                session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _SUBMIT_LOCK})
            if idempotency_key is not None:
                known = session.scalar(
                    select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == idempotency_key)
                )
                if known is not None:
                    if known.digest != digest:
                        raise Problem(
                            409, "job.idempotency_conflict",
                            "this Idempotency-Key was used for another job. Take a new one.", job=known.id,
                        )  # fmt: skip
                    return known, False
            active = session.scalar(
                select(func.count())
                .select_from(JobRow)
                .where(JobRow.owner == owner, JobRow.state.in_(ACTIVE))
            )
            if (active or 0) >= max_active:
                raise Problem(
                    429, "quota.jobs",
                    f"this key has {active} jobs pending or running; the limit is {max_active}. Wait, or cancel some.",
                    limit=max_active, given=active, retry_after=30,
                )  # fmt: skip
            for file in job.files:
                found = session.get(FileRow, file)
                if found is None or found.owner != owner:
                    raise Problem(404, "file.not_found", f"there is no file {file}.")
            row = JobRow(
                id=secrets.token_hex(12),
                owner=owner,
                kind=job.kind,
                name=job.name,
                spec=json.dumps(job.spec),
                files=json.dumps(list(job.files)),
                register=job.register,
                accept_weak=job.accept_weak,
                idempotency_key=idempotency_key,
                digest=digest,
                state=PENDING,
                attempt=0,
                failures=0,
                cancel=False,
                created=now(),
            )
            session.add(row)
            session.flush()
            return row, True

    def get(self, job_id: str, owner: str | None = None) -> JobRow:
        """`owner` None may see every job. Raises `Problem` 404, also for another owner's job."""
        with self.database.session() as session:
            row = session.scalar(select(JobRow).where(JobRow.id == job_id))
        if row is None or (owner is not None and row.owner != owner):
            raise not_found()
        return row

    def list(
        self,
        owner: str | None,
        *,
        state: str | None = None,
        kind: str | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> Rows:
        """Newest first; `before` is a job's number."""
        query = select(JobRow).order_by(JobRow.number.desc()).limit(limit)
        if owner is not None:
            query = query.where(JobRow.owner == owner)
        if state is not None:
            query = query.where(JobRow.state == state)
        if kind is not None:
            query = query.where(JobRow.kind == kind)
        if before is not None:
            query = query.where(JobRow.number < before)
        with self.database.session() as session:
            return list(session.scalars(query))

    def place(self, row: JobRow) -> int:
        """How many pending jobs of the same owner were submitted before."""
        with self.database.session() as session:
            return (
                session.scalar(
                    select(func.count())
                    .select_from(JobRow)
                    .where(JobRow.state == PENDING, JobRow.owner == row.owner, JobRow.number < row.number)
                )
                or 0
            )

    def cancel(self, job_id: str, owner: str | None = None) -> JobRow:
        """A pending job ends here; a running one is asked to, and ends when its run has. Raises `Problem` 404."""
        self.get(job_id, owner)
        with self.database.session() as session:
            ended = now()
            session.execute(
                update(JobRow)
                .where(JobRow.id == job_id, JobRow.state == PENDING)
                .values(state=CANCELLED, ended=ended, cancel=True, reason="cancelled before it began")
            )
            session.execute(
                update(JobRow).where(JobRow.id == job_id, JobRow.state == RUNNING).values(cancel=True)
            )
        return self.get(job_id, owner)

    def forget(self, job_id: str) -> None:
        """Delete the record of an ended job."""
        with self.database.session() as session:
            row = session.scalar(select(JobRow).where(JobRow.id == job_id))
            if row is not None and row.state in ENDED:
                session.delete(row)

    def owner_of(self, name: str, *, registered: bool = False) -> str | None:
        """The key that a model's name belongs to; None if to none. With `registered`, only a key whose job has
        registered a model under it."""
        with self.database.session() as session:
            which = select(NameRow.owner).where(NameRow.name == name)
            return session.scalar(which.where(NameRow.registered) if registered else which)

    def claim(self, owner: str, name: str, job_id: str | None = None, *, take: bool = False) -> bool:
        """Make `name` the owner's; False if it is another's. A name that another claimed is free again when none of
        that owner's jobs has registered it or still may. With `take`, it passes to this owner in any case."""
        with self.database.session() as session:
            insert = sqlite_insert if self.database.is_sqlite else postgres_insert
            made = insert(NameRow).values(name=name, owner=owner, since=now(), registered=False)
            session.execute(made.on_conflict_do_nothing(index_elements=[NameRow.name]))
            row = session.get(NameRow, name, with_for_update=True)
            assert row is not None
            if row.owner == owner:
                row.registered = row.registered or job_id is not None
                return True
            waiting = session.scalar(
                select(JobRow.id)
                .where(JobRow.register == name, JobRow.owner == row.owner, JobRow.state.in_(ACTIVE))
                .limit(1)
            )
            if take or not (row.registered or waiting):
                row.owner, row.since, row.registered = owner, now(), job_id is not None
                return True
            return False

    # ---------------------------------------------------------------------------------------------- scheduler

    def running(self) -> Jobs:
        with self.database.session() as session:
            return [_started(r) for r in session.scalars(select(JobRow).where(JobRow.state == RUNNING))]

    def start_next(self, lease: Lease, *, max_running: int, max_running_per_key: int) -> Started | None:
        """Move one job from PENDING to RUNNING, with its next attempt number, if there is room.

        Fair by key: of the keys with a pending job, the one with the fewest running jobs is next; of those, the
        one whose last start is longest ago; inside a key, in the order of submission. One key never takes the last
        place, so that its long jobs keep no other key waiting for them. Raises `LeaseLost`.
        """
        max_running_per_key = min(max_running_per_key, max(1, max_running - 1))
        with self.database.session() as session:
            lease.hold(session)
            busy: dict[str, int] = dict(
                session.execute(
                    select(JobRow.owner, func.count()).where(JobRow.state == RUNNING).group_by(JobRow.owner)
                )
                .tuples()
                .all()
            )
            if sum(busy.values()) >= max_running:
                return None
            firsts = {
                owner: number
                for owner, number in session.execute(
                    select(JobRow.owner, func.min(JobRow.number))
                    .where(JobRow.state == PENDING)
                    .group_by(JobRow.owner)
                )
                if busy.get(owner, 0) < max_running_per_key
            }
            if not firsts:
                return None
            last = dict(
                session.execute(
                    select(JobRow.owner, func.max(JobRow.started))
                    .where(JobRow.owner.in_(firsts))
                    .group_by(JobRow.owner)
                )
                .tuples()
                .all()
            )

            def turn(owner: str) -> tuple[int, str, int]:
                at = last[owner]
                return busy.get(owner, 0), at.isoformat() if at else "", firsts[owner]

            row = session.get(JobRow, firsts[min(firsts, key=turn)], with_for_update=True)
            if row is None or row.state != PENDING:
                return None  # cancelled in this moment
            row.state, row.attempt = RUNNING, row.attempt + 1
            row.started = row.started or now()
            session.flush()
            return _started(row)

    def again(self, lease: Lease, job: Started) -> Started | None:
        """The next attempt of a job whose attempt was lost. None if it is no longer at that attempt."""
        with self.database.session() as session:
            lease.hold(session)
            done: Any = session.execute(
                update(JobRow)
                .where(JobRow.id == job.id, JobRow.state == RUNNING, JobRow.attempt == job.attempt)
                .values(attempt=job.attempt + 1, failures=JobRow.failures + 1)
            )
            if not done.rowcount:
                return None
            row = session.scalar(select(JobRow).where(JobRow.id == job.id))
            assert row is not None
            return _started(row)

    def end(
        self, lease: Lease, job: Started, state: str, reason: str | None = None, registered: str | None = None
    ) -> bool:
        """RUNNING to an end state, if the job is still at this attempt. Raises `LeaseLost`."""
        with self.database.session() as session:
            lease.hold(session)
            done: Any = session.execute(
                update(JobRow)
                .where(JobRow.id == job.id, JobRow.state == RUNNING, JobRow.attempt == job.attempt)
                .values(state=state, ended=now(), reason=reason, registered=registered)
            )
            return bool(done.rowcount)

    def renew(self, lease: Lease) -> None:
        with self.database.session() as session:
            lease.hold(session)

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        with self.database.session() as session:
            rows = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            return dict(rows.tuples().all())

    def old(self, before: Any) -> Ids:
        """Jobs that ended before a time."""
        with self.database.session() as session:
            return list(
                session.scalars(select(JobRow.id).where(JobRow.state.in_(ENDED), JobRow.ended < before))
            )


def _using(session: Session, file_id: str) -> str | None:
    rows = session.execute(select(JobRow.id, JobRow.files).where(JobRow.state.in_(ACTIVE)))
    return next((job_id for job_id, files in rows if file_id in json.loads(files)), None)


def not_found() -> Problem:
    return Problem(404, "job.not_found", "there is no such job.")
