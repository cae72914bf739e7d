"""Alembic migrations of the service's database: one history, one file a change in `versions/`."""
