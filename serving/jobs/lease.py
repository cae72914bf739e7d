"""A lease in the database: one holder at a time, and a token that tells an old holder from the present one."""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable
from typing import Any

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from serving.database.base import Database, DatabaseUnavailable, now
from serving.jobs.tables import LeaseRow


class LeaseLost(Exception):
    """Another holds the lease now: whatever this holder was about to write must not be written."""


class Lease:
    """`seconds` after its last renewal another may take it. `clock` gives aware UTC times."""

    def __init__(
        self,
        database: Database,
        name: str = "scheduler",
        *,
        seconds: float = 15.0,
        clock: Callable[[], datetime.datetime] = now,
    ):
        self.database, self.name, self.seconds, self._clock = database, name, seconds, clock
        self.holder = uuid.uuid4().hex
        self.token = 0

    def _until(self) -> datetime.datetime:
        return self._clock() + datetime.timedelta(seconds=self.seconds)

    def acquire(self) -> bool:
        """Take the lease if it is free or has run out."""
        if self.token:
            return True
        with self.database.session() as session:
            row = session.get(LeaseRow, self.name, with_for_update=True)
            if row is None:
                try:
                    with session.begin_nested():
                        session.add(
                            LeaseRow(name=self.name, holder=self.holder, token=1, expires=self._until())
                        )
                except IntegrityError:  # another made it in this moment
                    return False
                self.token = 1
                return True
            if row.holder != self.holder and row.expires > self._clock():
                return False
            row.holder, row.token, row.expires = self.holder, row.token + 1, self._until()
            token = row.token
        self.token = token
        return True

    def hold(self, session: Session) -> None:
        """Renew inside a transaction, so that what it writes is written by the holder only. Raises
        `LeaseLost`."""
        if not self.token:
            raise LeaseLost
        done: Any = session.execute(
            update(LeaseRow)
            .where(LeaseRow.name == self.name, LeaseRow.token == self.token)
            .values(expires=self._until())
        )
        if not done.rowcount:
            self.token = 0
            raise LeaseLost

    def release(self) -> None:
        """Let another take it at once."""
        if not self.token:
            return
        token, self.token = self.token, 0
        try:
            with self.database.session() as session:
                session.execute(
                    update(LeaseRow)
                    .where(LeaseRow.name == self.name, LeaseRow.token == token)
                    .values(expires=self._clock() - datetime.timedelta(seconds=1))
                )
        except DatabaseUnavailable:
            pass  # it runs out by itself
