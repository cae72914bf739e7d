"""Run by Alembic, with the connection that `serving.database.base.Database.upgrade` hands in."""

from __future__ import annotations

from alembic import context

from serving.database.base import Base

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
