"""The service's database: SQLite by default, PostgreSQL by URL; one Alembic history for all of it.

    base      the declarative base, engines and sessions, migrations
    keys      API keys, their limits and what they used

Tables are changed only through `serving/migrations`.
"""
