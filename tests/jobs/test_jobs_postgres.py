"""The scheduler's tests once more on PostgreSQL, where transactions really run side by side.

Started here from Debian's binaries, on a socket of its own. Where there are none: apt-get install -y postgresql
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
import test_jobs_scheduler as on_sqlite

from serving.database.base import Database
from serving.database.keys import Keys
from serving.jobs.store import JobStore
from serving.settings import Settings

INSTALL = "apt-get install -y postgresql"


def binaries() -> Path | None:
    """The newest installed server's programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    which = shutil.which("initdb")
    return Path(which).parent if which else None


pytestmark = pytest.mark.skipif(binaries() is None, reason=f"PostgreSQL is not installed: {INSTALL}")


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A URL up to the database's name. The server refuses to run as root: then it runs as another user."""
    folder = Path(tempfile.mkdtemp(prefix="bspg-", dir="/tmp"))
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        names = {p.pw_name for p in pwd.getpwall()}
        name = "postgres" if "postgres" in names else "nobody"
        os.chown(folder, pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
        user = {"user": name}
    programs, data = binaries(), folder / "data"
    assert programs is not None

    def run(*command: str) -> None:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, timeout=120, env={"LC_ALL": "C"}, **user
        )
        assert done.returncode == 0, done.stderr

    run(str(programs / "initdb"), "-D", str(data), "-U", "bioseq", "-A", "trust", "-E", "UTF8", "--no-sync")
    options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=50"
    try:
        run(
            str(programs / "pg_ctl"), "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start"
        )
        yield f"postgresql://bioseq@/%s?host={folder}"
    finally:
        run(str(programs / "pg_ctl"), "-D", str(data), "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def settings(server: str, tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """Settings on a fresh database."""
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = Database(server % "postgres")
    with admin.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    admin.dispose()

    def make(**changes: Any) -> Settings:
        given: dict[str, Any] = {
            "database": server % name,
            "home": str(tmp_path / "home"),
            "data": str(tmp_path / "data"),
            "registry": str(tmp_path / "registry"),
        }
        return Settings.from_dict(given | changes)

    yield make


NAMES = [
    "test_two_hundred_jobs_at_once_are_queued_in_order_and_none_is_lost",
    "test_quota_holds_against_submissions_side_by_side",
    "test_the_same_idempotency_key_gives_the_same_job",
    "test_the_same_idempotency_key_sent_side_by_side_makes_one_job",
    "test_only_the_holder_of_the_lease_acts",
    "test_an_old_holder_can_write_nothing_once_another_has_taken_over",
    "test_a_restarted_scheduler_finds_running_jobs_and_starts_none_twice",
    "test_a_lost_run_is_resumed_as_a_new_attempt",
    "test_a_pending_job_is_cancelled_at_once_and_never_started",
    "test_a_key_with_a_long_queue_does_not_keep_another_waiting",
]


@pytest.mark.parametrize("name", NAMES)
def test_on_postgresql(name, rig):
    getattr(on_sqlite, name)(rig)


def test_many_schedulers_starting_at_once_act_as_one(rig):
    """Ten scheduler processes tick side by side: one holds the lease, and each job is started once."""
    import threading

    r = rig(max_running_jobs=5, max_running_jobs_per_key=5)
    for i in range(20):
        r.submit(f"key{i % 4}")
    schedulers = [r.new_scheduler() for _ in range(10)]
    acted = []

    def go(scheduler: Any) -> None:
        for _ in range(5):
            if scheduler.tick():
                acted.append(scheduler)

    threads = [threading.Thread(target=go, args=(s,)) for s in schedulers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(acted)) == 1 and len(acted) == 5
    assert len(r.executor.order) == 5


def test_keys_and_migrations(settings):
    """Several processes may migrate at once."""
    import threading

    made = settings()
    errors = []

    def upgrade() -> None:
        try:
            database = Database(made.database)
            database.upgrade()
            database.dispose()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=upgrade) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    keys = Keys(Database(made.database))
    info, text = keys.create("a", ("train",))
    found = keys.check(text)
    assert found is not None and found.id == info.id


def test_a_keys_limits_hold_over_many_at_once(settings):
    """Eight ingresses spend on one key side by side: exactly its limit is let through, and counted."""
    from concurrent.futures import ThreadPoolExecutor

    database = Database(settings().database)
    database.upgrade()
    keys = Keys(database)
    info, text = keys.create("a", requests_per_minute=30, tokens_per_minute=1000)
    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(lambda _: keys.spend(info, 7, 10), range(64)))
    assert said.count(None) == 30 and said.count("requests") == 34
    assert keys.used(info.id) == (30, 300)
    assert keys.spend(info, 8, 1001) == "tokens"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: keys.add_usage({(info.id, 9): (1, 5), (info.id, 10): (2, 1)}), range(20)))
    assert keys.used(info.id, since_minute=9) == (60, 120)
    keys.revoke(info.id)
    assert keys.check(text) is None and keys.any()
    database.dispose()


def test_owners_of_names_are_filled_in_from_the_jobs_that_registered_them(settings):
    """Migration 0003 on a database with jobs: the last one that registered a name decides, and without one there is no
    owner."""
    from alembic import command
    from alembic.config import Config

    import serving.database.migrations as migrations

    database = Database(settings().database)
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    rows = [("j1", "a", "head", "head@1"), ("j2", "b", "head", "head@2"), ("j3", "c", "head", None),
            ("j4", "a", "other", None), ("j5", "a", None, None)]  # fmt: skip
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for job_id, owner, register, registered in rows:
            connection.execute(
                sqlalchemy.text(
                    "INSERT INTO jobs (id, owner, kind, name, spec, files, register, accept_weak, digest, state, attempt, "
                    "failures, cancel, created, registered) VALUES (:id, :owner, 'finetune', 'n', '{}', '[]', :register, "
                    "false, 'd', 'SUCCEEDED', 1, 0, false, now(), :registered)"
                ),
                {"id": job_id, "owner": owner, "register": register, "registered": registered},
            )
    database.upgrade()
    with database.engine.connect() as connection:
        found = connection.execute(sqlalchemy.text("SELECT name, owner, registered FROM names")).fetchall()
    assert [tuple(row) for row in found] == [("head", "b", True)]
    store = JobStore(database)
    assert store.owner_of("head", registered=True) == "b"
    assert not store.claim("a", "head") and store.claim("a", "other")
    database.dispose()
