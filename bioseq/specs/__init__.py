"""Frozen dataclasses of every job, one file a job: exact JSON and TOML round trip, unknown keys refused."""
