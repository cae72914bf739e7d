"""Engine, sessions and migrations. Synchronous: callers in the event loop go through a thread."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import DateTime, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import DeclarativeBase, Session, sessionmaker
from sqlalchemy.types import TypeDecorator

from bioseq.errors import ResourceError, ServiceError


class DatabaseUnavailable(ServiceError):
    """The database does not answer."""

    def __init__(self, kind: str):
        super().__init__(
            f"the database does not answer ({kind}).",
            status=503, code="database.unavailable", retry_after=5, hint="Try again in a moment.",
        )  # fmt: skip


_LOCK = 0x62696F736571  # "bioseq": the advisory lock under which PostgreSQL is migrated


class Base(DeclarativeBase):
    """Base of all tables."""


class UtcTime(TypeDecorator[datetime.datetime]):
    """An aware time in UTC; SQLite keeps none of its own, so it is stored naive and read back aware."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Any) -> datetime.datetime | None:
        return None if value is None else value.astimezone(datetime.UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime.datetime | None, dialect: Any) -> datetime.datetime | None:
        return None if value is None else value.replace(tzinfo=datetime.UTC)


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def shown(url: str) -> str:
    """The URL without its password, for messages."""
    return make_url(url).render_as_string(hide_password=True)


class Database:
    """`url` is an SQLAlchemy URL; `postgresql://` means psycopg 3. Nothing is opened before the first use."""

    def __init__(self, url: str):
        parsed = make_url(url)
        if parsed.drivername in ("postgresql", "postgres"):
            parsed = parsed.set(drivername="postgresql+psycopg")
        self.url = parsed.render_as_string(hide_password=False)
        options: dict[str, Any] = {
            "pool_pre_ping": True,
            "pool_timeout": 10,
            "connect_args": {"connect_timeout": 5, "options": "-c statement_timeout=30000"},
        }
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        if self.is_sqlite:
            options = {"connect_args": {"check_same_thread": False, "timeout": 30}}
            if parsed.database and parsed.database != ":memory:":
                Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        self.engine: Engine = create_engine(parsed, **options)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _tune_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back on any error. Raises `DatabaseUnavailable`, which names no
        host, and `ResourceError` for what the database refuses."""
        try:
            with self._sessions.begin() as session:
                yield session
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            raise DatabaseUnavailable(type(error).__name__) from error
        except SQLAlchemyError as error:
            raise ResourceError(
                f"the database refused a statement: {type(error).__name__}.",
                hint="Check that this version of bioseq fits its tables.",
            ) from error

    def upgrade(self) -> None:
        """Bring the tables to the newest migration; several processes may do so at once."""
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        try:
            with self.engine.connect() as connection:
                if not self.is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                connection.commit()
        except SQLAlchemyError as error:
            raise ResourceError(
                f"the database {shown(self.url)} cannot be opened: {type(error).__name__}.",
                hint="Check the URL (--database), that the server runs, and that the folder can be written.",
            ) from error

    def dispose(self) -> None:
        self.engine.dispose()


def _tune_sqlite(connection: Any, _: Any) -> None:
    """Readers beside a writer, and foreign keys. pysqlite's own transaction handling is switched off, so that
    DDL is transactional and BEGIN is ours."""
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "busy_timeout=30000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    """The write lock at once: a reader that turns writer later could not wait for it, and would fail."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
