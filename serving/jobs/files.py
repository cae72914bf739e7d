"""Uploaded files: streamed to disk, checksummed, owned by a key, kept for a stated time.

A file lies at DATA/files/ID/NAME. The id is ours; the name is the user's, of harmless letters only, and is
kept because readers go by its ending. A row in the database says that the file is whole.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio.to_thread
from sqlalchemy import delete, func, select

from bioseq.output import sync_folder
from serving.database.base import Database, now
from serving.jobs.store import _using
from serving.jobs.tables import FileRow
from serving.problems import Problem

Rows = list[FileRow]  # the method `FileStore.list` hides the type's name inside the class
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,119}")
SUFFIXES = (".fasta", ".fa", ".faa", ".fna", ".fas", ".csv", ".tsv", ".parquet", ".txt", ".json", ".toml")
PACKED = (".gz", ".xz")


def check_name(name: str) -> str:
    """Raises `Problem` 422 for a name with a folder, odd letters, or an ending that no reader knows."""
    if not NAME.fullmatch(name) or ".." in name:
        raise Problem(
            422, "file.name", "a file name is 1 to 120 of A-Z a-z 0-9 . _ + -, without folders.", field="name"
        )
    bare = name.lower()
    for packed in PACKED:
        bare = bare.removesuffix(packed)
    if not bare.endswith(SUFFIXES):
        raise Problem(
            422, "file.type",
            f"files end in {', '.join(SUFFIXES)}, plain or with .gz or .xz. Models go to /v1/models.", field="name",
        )  # fmt: skip
    return name


class FileStore:
    """`data` is the folder of all files and jobs."""

    def __init__(self, database: Database, data: str | Path):
        self.database, self.root = database, Path(data) / "files"

    def path(self, row: FileRow) -> Path:
        return self.root / row.id / row.name

    def used(self, owner: str) -> int:
        """Bytes that an owner has stored."""
        with self.database.session() as session:
            return int(
                session.scalar(
                    select(func.coalesce(func.sum(FileRow.bytes), 0)).where(FileRow.owner == owner)
                )
                or 0
            )

    async def receive(
        self,
        owner: str,
        name: str,
        pieces: AsyncIterator[bytes],
        *,
        max_bytes: int,
        max_stored: int,
        days: int,
        sha256: str | None = None,
        announced: int | None = None,
    ) -> FileRow:
        """Write a stream to disk and enter it. Nothing is left of an upload that fails.

        Raises `Problem` 413 (file or quota), 422 (name, checksum); whatever `pieces` raises.
        """
        check_name(name)
        run = anyio.to_thread.run_sync
        room = max_stored - await run(self.used, owner)
        limit = min(max_bytes, room)
        if announced is not None and announced > limit:
            raise _too_large(max_bytes, room)
        file_id = secrets.token_hex(12)
        folder = self.root / f".incoming-{file_id}"
        await run(lambda: folder.mkdir(parents=True, mode=0o750))
        digest, size = hashlib.sha256(), 0
        try:
            with open(folder / name, "xb") as out:
                async for piece in pieces:
                    size += len(piece)
                    if size > limit:
                        raise _too_large(max_bytes, room)
                    await run(_write, out, digest, piece)
                await run(_sync, out)
            found = digest.hexdigest()
            if sha256 is not None and sha256.lower() != found:
                raise Problem(
                    422, "file.checksum", "the bytes received do not have the sha256 that was given."
                )
            created = now()
            row = FileRow(
                id=file_id, owner=owner, name=name, bytes=size, sha256=found, created=created,
                expires=created + datetime.timedelta(days=days),
            )  # fmt: skip
            await run(self._enter, folder, row, max_stored)
            return row
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _enter(self, folder: Path, row: FileRow, max_stored: int) -> None:
        target = self.root / row.id
        os.rename(folder, target)
        for changed in (target, self.root):  # a rename is lost with the power until its folder is synced
            sync_folder(changed)
        try:
            with self.database.session() as session:
                session.add(row)
                session.flush()
                stored = session.scalar(
                    select(func.sum(FileRow.bytes)).where(FileRow.owner == row.owner)
                )  # uploads side by side: counted again with this one in
                if int(stored or 0) > max_stored:
                    raise _too_large(max_stored, 0)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise

    def get(self, file_id: str, owner: str | None) -> FileRow:
        """Raises `Problem` 404, also for another owner's file."""
        with self.database.session() as session:
            row = session.get(FileRow, file_id)
        if row is None or (owner is not None and row.owner != owner):
            raise Problem(404, "file.not_found", "there is no such file.")
        return row

    def list(self, owner: str, *, limit: int = 1000) -> Rows:
        with self.database.session() as session:
            query = (
                select(FileRow).where(FileRow.owner == owner).order_by(FileRow.created.desc()).limit(limit)
            )
            return list(session.scalars(query))

    def delete(self, file_id: str, owner: str | None) -> None:
        """Raises `Problem` 404, and 409 while a pending or running job needs the file."""
        self.get(file_id, owner)
        with self.database.session() as session:
            job = _using(session, file_id)
            if job is not None:
                raise Problem(409, "file.in_use", f"job {job} needs this file. Cancel it first.", job=job)
            session.execute(delete(FileRow).where(FileRow.id == file_id))
        shutil.rmtree(self.root / file_id, ignore_errors=True)

    def sweep(self) -> int:
        """Delete what is past its time and not in use, and leftovers of broken uploads. Returns how many."""
        with self.database.session() as session:
            old = list(session.scalars(select(FileRow.id).where(FileRow.expires < now())))
        count = 0
        for file_id in old:
            with contextlib.suppress(Problem):
                self.delete(file_id, None)
                count += 1
        for folder in self.root.glob(".incoming-*"):
            with contextlib.suppress(OSError):
                if time.time() - folder.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(folder)
        return count


def _write(out: Any, digest: Any, piece: bytes) -> None:
    digest.update(piece)
    out.write(piece)


def _sync(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _too_large(max_bytes: int, room: int) -> Problem:
    if room < max_bytes:
        return Problem(
            413, "quota.storage", f"this key has room for {max(room, 0)} more bytes. Delete files first.",
            limit=max(room, 0),
        )  # fmt: skip
    return Problem(413, "request.too_large", f"a file may have {max_bytes} bytes.", limit=max_bytes)
