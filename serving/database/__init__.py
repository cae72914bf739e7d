"""SQLAlchemy tables and sessions on SQLite or PostgreSQL: `base.Database`, and `keys.Keys` for API keys and usage.

Other rooms declare their own tables on `base.Base`; `migrations` brings a database to the newest version.
"""
