"""API keys and what they used.

A key reads `bsk_ID_SECRET`. Only the SHA-256 of the secret is kept: it has 256 bits of entropy, so a slow
hash would add cost and no safety. It is shown once, when it is made. A revoked key stays in the table, and
with it the rule that keys are asked for.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, Integer, String, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Mapped, mapped_column

from bioseq.errors import NotFoundError, SpecError
from serving.database.base import Base, Database, UtcTime, now

SCOPES = ("read", "predict", "train", "admin")


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[str] = mapped_column(String(100))
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    tokens_per_minute: Mapped[int | None] = mapped_column(BigInteger)
    created: Mapped[datetime.datetime] = mapped_column(UtcTime)
    expires: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    revoked: Mapped[datetime.datetime | None] = mapped_column(UtcTime)


class Usage(Base):
    """What a key used in one minute; `minute` counts from the epoch."""

    __tablename__ = "usage"

    key_id: Mapped[str] = mapped_column(String(16), ForeignKey("api_keys.id"), primary_key=True)
    minute: Mapped[int] = mapped_column(Integer, primary_key=True)
    requests: Mapped[int] = mapped_column(BigInteger, default=0)
    tokens: Mapped[int] = mapped_column(BigInteger, default=0)


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """A key without its secret. `id` owns what the key makes (files, jobs)."""

    id: str
    name: str
    scopes: frozenset[str]
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    created: datetime.datetime | None = None
    expires: datetime.datetime | None = None
    revoked: datetime.datetime | None = None

    def allows(self, scope: str) -> bool:
        """`admin` includes every other scope."""
        return scope in self.scopes or "admin" in self.scopes


ANONYMOUS = KeyInfo("anonymous", "no key", frozenset(SCOPES))


def _info(row: ApiKey) -> KeyInfo:
    return KeyInfo(
        row.id, row.name, frozenset(row.scopes.split()), row.requests_per_minute, row.tokens_per_minute,
        row.created, row.expires, row.revoked,
    )  # fmt: skip


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """The key room of a database."""

    def __init__(self, database: Database):
        self.database = database

    def create(
        self,
        name: str,
        scopes: tuple[str, ...] = ("read", "predict"),
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        days: int | None = None,
    ) -> tuple[KeyInfo, str]:
        """A new key and its text, which is kept nowhere. Raises `SpecError`."""
        for scope in scopes:
            if scope not in SCOPES:
                raise SpecError(f"{scope!r} is not one of {', '.join(SCOPES)}.", field="scopes")
        if not scopes or not name or len(name) > 200:
            raise SpecError("a name of 1 to 200 characters and at least one scope are needed.", field="name")
        for field, value in (
            ("requests_per_minute", requests_per_minute),
            ("tokens_per_minute", tokens_per_minute),
            ("days", days),
        ):
            if value is not None and value < 1:
                raise SpecError(f"{value} is below 1.", field=field)
        secret, created = secrets.token_urlsafe(32), now()
        row = ApiKey(
            id=secrets.token_hex(6),
            name=name,
            digest=_digest(secret),
            scopes=" ".join(s for s in SCOPES if s in scopes),
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            created=created,
            expires=created + datetime.timedelta(days=days) if days else None,
        )
        with self.database.session() as session:
            session.add(row)
        return _info(row), f"bsk_{row.id}_{secret}"

    def list(self) -> list[KeyInfo]:
        with self.database.session() as session:
            return [_info(row) for row in session.scalars(select(ApiKey).order_by(ApiKey.created))]

    def any(self) -> bool:
        """Whether a key was ever made."""
        with self.database.session() as session:
            return session.scalar(select(ApiKey.id).limit(1)) is not None

    def revoke(self, key_id: str) -> KeyInfo:
        """Raises `NotFoundError`."""
        with self.database.session() as session:
            row = session.get(ApiKey, key_id)
            if row is None:
                raise NotFoundError(
                    f"there is no key {key_id!r}.", code="key.not_found", hint="See bioseq keys list."
                )
            if row.revoked is None:
                row.revoked = now()
            return _info(row)

    def check(self, text: str) -> KeyInfo | None:
        """The key that this text is, or None if it is unknown, revoked or expired."""
        parts = text.split("_", 2)
        if len(parts) != 3 or parts[0] != "bsk":
            return None
        with self.database.session() as session:
            row = session.get(ApiKey, parts[1])
            # Compared also where there is no row, so that the time tells nothing about ids.
            same = hmac.compare_digest(_digest(parts[2]), row.digest if row else "0" * 64)
            if row is None or not same or row.revoked or (row.expires and row.expires <= now()):
                return None
            return _info(row)

    def add_usage(self, used: dict[tuple[str, int], tuple[int, int]]) -> None:
        """Add (requests, tokens) to (key id, minute)."""
        if not used:
            return
        with self.database.session() as session:
            for (key_id, minute), (requests, tokens) in used.items():
                session.execute(self._upsert(key_id, minute, requests, tokens))

    def count(self, owner: str, minute: int, tokens: int) -> None:
        """Add what a job of this owner computed, if the owner is a key."""
        if tokens:
            with self.database.session() as session:
                if session.get(ApiKey, owner) is not None:
                    session.execute(self._upsert(owner, minute, 0, tokens))

    def _upsert(self, key_id: str, minute: int, requests: int, tokens: int) -> Any:
        insert = sqlite_insert if self.database.is_sqlite else postgres_insert
        made = insert(Usage).values(key_id=key_id, minute=minute, requests=requests, tokens=tokens)
        return made.on_conflict_do_update(
            index_elements=[Usage.key_id, Usage.minute],
            set_={"requests": Usage.requests + requests, "tokens": Usage.tokens + tokens},
        )

    def spend(self, key: KeyInfo, minute: int, tokens: int, requests: int = 1) -> str | None:
        """Count requests and tokens, unless that would pass the key's limits in this minute: then
        the limit's name. One statement decides, so that it holds over any number of ingress replicas."""
        with self.database.session() as session:
            session.execute(self._upsert(key.id, minute, 0, 0))
            statement = update(Usage).where(Usage.key_id == key.id, Usage.minute == minute)
            if requests and key.requests_per_minute is not None:
                statement = statement.where(Usage.requests + requests <= key.requests_per_minute)
            if tokens and key.tokens_per_minute is not None:
                statement = statement.where(Usage.tokens + tokens <= key.tokens_per_minute)
            done: Any = session.execute(
                statement.values(requests=Usage.requests + requests, tokens=Usage.tokens + tokens)
            )
            if done.rowcount:
                return None
            row = session.get(Usage, (key.id, minute))
            limit = key.requests_per_minute
            full = requests and row is not None and limit is not None and row.requests + requests > limit
            return "requests" if full else "tokens"

    def fold(self, before: datetime.datetime) -> int:
        """Add usage from before a time up to one row a key, so that the table does not grow for ever. Returns how many
        rows went."""
        minute = int(before.timestamp() // 60)
        with self.database.session() as session:
            old = (Usage.minute > 0, Usage.minute < minute)
            sums = select(Usage.key_id, func.sum(Usage.requests), func.sum(Usage.tokens)).where(*old)
            for key_id, requests, tokens in session.execute(sums.group_by(Usage.key_id)).all():
                session.execute(self._upsert(key_id, 0, int(requests), int(tokens)))
            done: Any = session.execute(delete(Usage).where(*old))
            return int(done.rowcount)

    def used(self, key_id: str, *, since_minute: int = 0) -> tuple[int, int]:
        """Requests and tokens of a key since a minute."""
        with self.database.session() as session:
            row = session.execute(
                select(
                    func.coalesce(func.sum(Usage.requests), 0), func.coalesce(func.sum(Usage.tokens), 0)
                ).where(Usage.key_id == key_id, Usage.minute >= since_minute)
            ).one()
            return int(row[0]), int(row[1])
